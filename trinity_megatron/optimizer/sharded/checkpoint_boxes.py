"""The state of a distributed optimizer in a checkpoint, each rank's shard where it lies.

A shard of Megatron's distributed optimizer is a range of the flattened parameter.  In a checkpoint
the parameter has its own shape, so a range becomes a few boxes: the rest of a row, whole rows, the
beginning of a row, and the same in every further dimension.  Every rank writes and reads its own
boxes.  Megatron's own way is to gather the state of a whole tensor-, pipeline- and expert-parallel
part in the memory of each of its ranks (391 GB for Trinity Large with EP8), to save and to load.
Names and shapes in the checkpoint are the same, so that either reads what the other wrote.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor


class Box(NamedTuple):
    """A part of a tensor: its first index and its size in every dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def intersect(self, other: "Box") -> "Box | None":
        """What both hold; None if that is nothing."""
        offset = tuple(map(max, self.offset, other.offset))
        ends = [
            min(o + s, p + t)
            for o, s, p, t in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Box(offset, shape) if all(size > 0 for size in shape) else None


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut a range of a flattened tensor into boxes.

    Args:
        shape: Of the tensor, at least one dimension.
        start: First element.
        stop: Element behind the last.

    Yields:
        Boxes in the order of their elements, at most ``2 len(shape) - 1``.
    """
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows: from first to below last
    if first > last:  # inside a single row
        yield from _boxes_of_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _boxes_of_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < stop:
        yield from _boxes_of_row(shape, last, 0, stop - last * row)


def _boxes_of_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((index, *box.offset), (1, *box.shape))


def shard_to_boxes(
    described: ShardedTensor | ShardedTensorFactory,
    key: str,
    shard: Tensor,
    start: int,
    instance: int,
) -> list[ShardedTensor]:
    """Describe a shard of an optimizer state for Megatron's distributed checkpoint.

    Args:
        described: The parameter in the model's sharded state dict, with the parameter as data.
        key: Name of the state in the checkpoint.
        shard: ``[count]``, the elements of the state that this rank holds, any dtype.
        start: The first of them in the flattened parameter.
        instance: Number of the optimizer instance; the first one writes.

    Returns:
        Boxes, whose data are views of ``shard``.

    Raises:
        ValueError: The parameter is saved as something else than slices of it, or its replica_id
            is not Megatron's (pipeline, tensor, data).
    """
    parameter = described.data
    strides = _row_major(parameter.shape)
    pieces = list(boxes_of_range(parameter.shape, start, start + len(shard)))
    found = []
    for part in _parts(described):
        whole = _box_of_view(described.key, parameter.shape, part.data)
        axes = len(part.global_offset) - parameter.dim()  # that come before, as of layers
        for piece in pieces:
            box = piece.intersect(whole)
            if box is None:
                continue
            first = sum(o * stride for o, stride in zip(box.offset, strides, strict=True)) - start
            view = shard.as_strided(box.shape, strides, shard.storage_offset() + first)
            inside = zip(part.global_offset[axes:], box.offset, whole.offset, strict=True)
            found.append(
                replace(
                    part,
                    key=key,
                    data=view[(None,) * axes],
                    dtype=shard.dtype,
                    local_shape=(1,) * axes + box.shape,
                    global_offset=(
                        *part.global_offset[:axes],
                        *(base + offset - zero for base, offset, zero in inside),
                    ),
                    axis_fragmentations=None,  # boxes lie on no regular grid
                    # Of the data-parallel ranks of an instance none has the same box.
                    replica_id=(*_replica(part)[:2], instance),
                    prepend_axis_num=0,
                )
            )
    return found


def _parts(described: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The slices of the parameter that are saved; their data are views of a meta tensor."""
    meta = torch.empty(described.data.shape, device="meta")
    if isinstance(described, ShardedTensor):
        return [replace(described, data=meta, dtype=meta.dtype)]
    parts = described.build_fn(described.key, meta, described.replica_id, None)
    return list(parts.values() if isinstance(parts, Mapping) else parts)


def _box_of_view(key: str, shape: torch.Size, view: Tensor) -> Box:
    strides = _row_major(shape)
    fits = view.dim() == len(shape) and all(
        size == 1 or own == stride
        for size, own, stride in zip(view.shape, view.stride(), strides, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{key}: a parameter of shape {tuple(shape)} is saved as {tuple(view.shape)} with "
            f"strides {view.stride()}, which is no slice of it; its optimizer state cannot be "
            "saved where it lies"
        )
    offset, rest = [], int(view.storage_offset())
    for stride in strides:
        offset.append(rest // stride)
        rest %= stride
    return Box(tuple(offset), tuple(view.shape))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _replica(part: ShardedTensor) -> tuple[int, ...]:
    if not isinstance(part.replica_id, tuple) or len(part.replica_id) != 3:
        raise ValueError(
            f"{part.key}: replica_id={part.replica_id} is not (pipeline, tensor, data) parallel"
        )
    return part.replica_id


def collect_boxes(views: Mapping[int, Tensor], loaded: Mapping[int, Tensor]) -> None:
    """Put what was loaded where it belongs.

    Args:
        views: Data of the boxes, as they were asked for.
        loaded: What came for each, mostly the same memory.
    """
    for number, view in views.items():
        came = loaded[number]
        if came.data_ptr() != view.data_ptr():
            view.copy_(came.view(view.shape))
