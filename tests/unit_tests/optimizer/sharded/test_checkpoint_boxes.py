"""The boxes of a shard: all of it, nothing twice, and where the parameter itself is saved."""

import math
import random

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from trinity_megatron.optimizer.sharded.checkpoint_boxes import (
    Box,
    boxes_of_range,
    collect_boxes,
    shard_to_boxes,
)

INSTANCE = 3
Described = ShardedTensor | ShardedTensorFactory


def elements(box: Box, indices: Tensor) -> Tensor:
    slices = tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape, strict=True))
    return indices[slices].flatten()


def test_boxes_are_the_range() -> None:
    rng = random.Random(0)
    for _ in range(500):
        shape = [rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
        numel = math.prod(shape)
        start, stop = sorted((rng.randint(0, numel), rng.randint(0, numel)))
        boxes = list(boxes_of_range(shape, start, stop))
        indices = torch.arange(numel).view(shape)
        found = [elements(box, indices) for box in boxes]
        expected = torch.arange(start, stop)
        assert torch.equal(torch.cat(found) if found else expected[:0], expected)
        assert len(boxes) <= 2 * len(shape) - 1
        assert all(len(part) for part in found)


def test_whole_rows_are_one_box() -> None:
    assert list(boxes_of_range((8, 3, 4), 24, 72)) == [Box((2, 0, 0), (4, 3, 4))]


def describe_matrix(param: Tensor, **more: object) -> ShardedTensor:
    """The second of three tensor-parallel column blocks."""
    return ShardedTensor.from_rank_offsets("w", param, (1, 1, 3), replica_id=(0, 0, 5), **more)


def describe_layer(param: Tensor) -> ShardedTensor:
    """The fourth of seven layers, the first of two row blocks."""
    return ShardedTensor.from_rank_offsets(
        "w", param, (0, 3, 7), (1, 0, 2), replica_id=(0, 1, 5), prepend_axis_num=1
    )


def describe_gate_and_up(param: Tensor) -> ShardedTensorFactory:
    """Experts of the first of two ranks; gate and up apart, the last of two tensor-parallel."""

    def build(key: str, tensor: Tensor, replica: object, _: object) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key, part, (0, 0, 2), (1, 1 + 2 * number, 4), replica_id=replica
            )
            for number, part in enumerate(tensor.chunk(2, dim=1))
        ]

    return ShardedTensorFactory("w", param, build, lambda parts: torch.cat(parts, dim=1), (0, 0, 5))


def place(parts: list[ShardedTensor]) -> Tensor:
    """All parts in a tensor of the global shape; -1 where there is none.  Refuses to put twice."""
    whole = torch.full(parts[0].global_shape, -1, dtype=parts[0].dtype)
    for part in parts:
        target = whole[part.global_slice()]
        assert (target == -1).all()
        target.copy_(part.data)
    return whole


SHAPES = {
    describe_matrix: (5, 4),
    describe_layer: (4, 3),
    describe_gate_and_up: (3, 6, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("describe", SHAPES)
def test_boxes_lie_where_the_parameter_does(describe, ranks: int, dtype: torch.dtype) -> None:
    param = torch.arange(math.prod(SHAPES[describe]), dtype=dtype).view(SHAPES[describe])
    described: Described = describe(param)
    expected = place(
        [described]
        if isinstance(described, ShardedTensor)
        else described.build_fn("w", param, described.replica_id, None)
    )
    size = -(-param.numel() // ranks)
    boxes = []
    for rank in range(ranks):
        # The shard is itself a part of a buffer.
        shard = param.flatten()[rank * size :][:size]
        boxes += shard_to_boxes(described, "state.w", shard, rank * size, INSTANCE)
    assert torch.equal(place(boxes), expected)
    for box in boxes:
        box.validate_metadata_integrity()
        assert box.key == "state.w" and not box.has_regular_grid
        assert box.replica_id == (*described.replica_id[:2], INSTANCE)
        assert box.data.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()


def test_flexible_shapes_stay_flexible() -> None:
    """The vocabulary's padding differs from layout to layout."""
    described = describe_matrix(torch.zeros(5, 4), allow_shape_mismatch=True)
    boxes = shard_to_boxes(described, "state.w", torch.zeros(7), 2, INSTANCE)
    assert len(boxes) > 1 and all(box.allow_shape_mismatch for box in boxes)


def test_what_is_no_slice_is_refused() -> None:
    param = torch.zeros(3, 4)

    def build(key: str, tensor: Tensor, replica: object, _: object) -> list[ShardedTensor]:
        return [ShardedTensor.from_rank_offsets(key, tensor.t(), replica_id=replica)]

    described = ShardedTensorFactory("w", param, build, lambda parts: parts[0].t(), (0, 0, 0))
    with pytest.raises(ValueError, match=r"w: .*\(3, 4\).*\(4, 3\).*no slice"):
        shard_to_boxes(described, "state.w", torch.zeros(12), 0, INSTANCE)


def test_an_unknown_replica_is_refused() -> None:
    described = ShardedTensor.from_rank_offsets("w", torch.zeros(2, 2), replica_id=1)
    with pytest.raises(ValueError, match="replica_id=1"):
        shard_to_boxes(described, "state.w", torch.zeros(4), 0, INSTANCE)


def test_what_came_elsewhere_is_copied() -> None:
    shard = torch.zeros(6)
    views = {0: shard[:2].view(1, 2), 1: shard[2:].view(2, 2)}
    views[0].fill_(1.0)  # came in place
    collect_boxes(views, {0: views[0], 1: torch.full((2, 2), 2.0)})
    assert shard.tolist() == [1, 1, 2, 2, 2, 2]
