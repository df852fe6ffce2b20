"""Transforms between Hugging Face's and Megatron's tensors, as blocks of the same values.

A conversion computes nothing: every Megatron tensor is tiled by blocks, each of which is a block of
one Hugging Face tensor.  A transform is the list of these blocks.  Read from left to right it is
the import, from right to left its inverse, the export; a part of a tensor (what one rank holds, one
stored shard) is the same list clipped to that part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """The same numbers in the same (row-major) order on both sides.

    Attributes:
        hf_name: Tensor on the Hugging Face side.
        hf_start: Where the block begins in it, per dimension.
        hf_shape: Size of the block there.
        megatron_start: Where the block begins in the whole (unsharded) Megatron tensor.
        megatron_shape: Size of the block there; ``hf_shape`` up to leading ones.
    """

    hf_name: str
    hf_start: Shape
    hf_shape: Shape
    megatron_start: Shape
    megatron_shape: Shape

    def hf_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block of the Hugging Face tensor."""
        return _box(tensor, self.hf_start, self.hf_shape)

    def megatron_view(self, tensor: torch.Tensor, start: Shape | None = None) -> torch.Tensor:
        """The block of the Megatron tensor, in Hugging Face's shape: the inverse.

        Args:
            tensor: The Megatron tensor, or a part of it that holds the block.
            start: Where that part begins in the whole.
        """
        origin = start or (0,) * len(self.megatron_start)
        inside = tuple(at - zero for at, zero in zip(self.megatron_start, origin, strict=True))
        box = _box(tensor, inside, self.megatron_shape)
        # An index for a dimension of size one, not reshape(): always a view, to be written to.
        return box[(0,) * (len(self.megatron_shape) - len(self.hf_shape))]

    def clip(self, start: Shape, shape: Shape) -> "Block | None":
        """What of the block lies in a part of the Megatron tensor; None if nothing does."""
        low = tuple(map(max, self.megatron_start, start))
        ends = (
            tuple(at + size for at, size in zip(*box, strict=True))
            for box in ((self.megatron_start, self.megatron_shape), (start, shape))
        )
        high = tuple(map(min, *ends))
        if any(b <= a for a, b in zip(low, high, strict=True)):
            return None
        sizes = tuple(b - a for a, b in zip(low, high, strict=True))
        moved = (a - b for a, b in zip(low, self.megatron_start, strict=True))
        # A leading dimension that only Megatron has is of size one in the block.
        extra = len(self.megatron_shape) - len(self.hf_shape)
        hf_moved = tuple(moved)[extra:]
        hf_start = tuple(a + b for a, b in zip(self.hf_start, hf_moved, strict=True))
        return Block(self.hf_name, hf_start, sizes[extra:], low, sizes)


Transform = tuple[Shape, list[Block]]


def _box(tensor: torch.Tensor, start: Shape, shape: Shape) -> torch.Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def same(names: Sequence[str], shapes: Sequence[Shape]) -> Transform:
    """One tensor, the same on both sides.

    Returns:
        Shape of the Megatron tensor and its blocks.
    """
    (name,), (shape,) = names, shapes
    zero = (0,) * len(shape)
    return shape, [Block(name, zero, shape, zero, shape)]


def rows(names: Sequence[str], shapes: Sequence[Shape]) -> Transform:
    """``[first; second; ...]``: the gate rows, then the up rows, of a gated linear unit."""
    blocks, at = [], 0
    for name, shape in zip(names, shapes, strict=True):
        blocks.append(Block(name, (0, 0), shape, (at, 0), shape))
        at += shape[0]
    return (at, shapes[0][1]), blocks


def query_groups(
    names: Sequence[str], shapes: Sequence[Shape], *, num_query_groups: int
) -> Transform:
    """q, gate, k, v (in this order) interleaved as ``[q.. | gate.. | k | v]`` per query group.

    Source: Megatron-Core, ``SelfAttention.get_query_key_value_tensors`` with an output gate.
    """
    blocks, at, columns = [], 0, shapes[0][1]
    for group in range(num_query_groups):
        for name, shape in zip(names, shapes, strict=True):
            part = (shape[0] // num_query_groups, columns)
            blocks.append(Block(name, (group * part[0], 0), part, (at, 0), part))
            at += part[0]
    return (at, columns), blocks


def stack(experts: Sequence[Transform]) -> Transform:
    """The same transform for every expert, stacked along a new first dimension."""
    blocks = [
        Block(
            block.hf_name,
            block.hf_start,
            block.hf_shape,
            (index, *block.megatron_start),
            (1, *block.megatron_shape),
        )
        for index, (_, inner) in enumerate(experts)
        for block in inner
    ]
    return (len(experts), *experts[0][0]), blocks


def stacked(names: Sequence[str], shapes: Sequence[Shape]) -> Transform:
    """A tensor that is stacked over the experts on both sides: one block per expert."""
    (name,), (shape,) = names, shapes
    zero = (0,) * (len(shape) - 1)
    part = (1, *shape[1:])
    return shape, [Block(name, (e, *zero), part, (e, *zero), part) for e in range(shape[0])]


def cut(shape: Shape, max_numbers: int) -> list[tuple[Shape, Shape]]:
    """Cut a tensor along its first dimension into parts of about so many numbers.

    Returns:
        Start and shape of each.
    """
    step = max(max_numbers * shape[0] // prod(shape), 1)
    rest = (0,) * (len(shape) - 1)
    firsts = range(0, shape[0], step)
    return [((at, *rest), (min(step, shape[0] - at), *shape[1:])) for at in firsts]


def check_tiling(shape: Shape, blocks: Sequence[Block]) -> None:
    """Assert that the blocks fill the Megatron tensor exactly once.

    Every transform above lays its blocks one after the other in row-major order.
    """
    at = 0
    for block in blocks:
        offset = 0
        for position, size in zip(block.megatron_start, shape, strict=True):
            offset = offset * size + position
        assert offset == at and prod(block.hf_shape) == prod(block.megatron_shape), block
        at += prod(block.megatron_shape)
    assert at == prod(shape), (shape, at)
