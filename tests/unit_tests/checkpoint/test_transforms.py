"""Blocks of equal numbers against whole tensors put together by other means."""

import random
from collections.abc import Mapping
from itertools import pairwise, product
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.reference.hf_afmoe import split_qkv_gate
from trinity_megatron.checkpoint.param_mapping import Entry
from trinity_megatron.checkpoint.transforms import (
    Block,
    Shape,
    Transform,
    check_tiling,
    cut,
    query_groups,
    rows,
    same,
    stack,
    stacked,
)

HEAD, HIDDEN = 3, 5


def count_up(shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    """Tensors in which no number occurs twice, so that one in a wrong place is seen."""
    tensors, at = {}, 0
    for name, shape in shapes.items():
        tensors[name] = torch.arange(at, at + prod(shape)).reshape(shape)
        at += prod(shape)
    return tensors


def attention(heads: int, groups: int) -> tuple[Transform, dict[str, torch.Tensor]]:
    """A fused projection and the four it is made of."""
    width = {"q": heads, "gate": heads, "k": groups, "v": groups}
    shapes = {name: (count * HEAD, HIDDEN) for name, count in width.items()}
    transform = query_groups(list(shapes), list(shapes.values()), num_query_groups=groups)
    return transform, count_up(shapes)


def experts(count: int) -> tuple[Transform, dict[str, torch.Tensor]]:
    """Gate and up rows of each expert, stacked."""
    shapes = {f"{part}{e}": (4, HIDDEN) for e in range(count) for part in ("gate", "up")}
    each = [rows([f"gate{e}", f"up{e}"], [(4, HIDDEN)] * 2) for e in range(count)]
    return stack(each), count_up(shapes)


def one(transform: Any, shape: Shape) -> tuple[Transform, dict[str, torch.Tensor]]:
    return transform(["w"], [shape]), count_up({"w": shape})


def gate_up() -> tuple[Transform, dict[str, torch.Tensor]]:
    shapes = {"gate": (6, HIDDEN), "up": (6, HIDDEN)}
    return rows(list(shapes), list(shapes.values())), count_up(shapes)


CASES = {
    "vector": one(same, (7,)),
    "matrix": one(same, (7, HIDDEN)),
    "gate and up": gate_up(),
    "every head its own key": attention(heads=4, groups=4),
    "two heads per key": attention(heads=4, groups=2),
    "eight heads per key": attention(heads=16, groups=2),
    "one key": attention(heads=8, groups=1),
    "experts": experts(count=5),
    "stacked experts": one(stacked, (5, 8, HIDDEN)),
}
each_case = pytest.mark.parametrize("case", CASES)


def fill(
    blocks: list[Block], hf: dict[str, torch.Tensor], shape: Shape, start: Shape | None = None
) -> torch.Tensor:
    """A Megatron tensor, or a part of it; -1 where no block writes."""
    tensor = torch.full(shape, -1)
    for block in blocks:
        block.megatron_view(tensor, start).copy_(block.hf_view(hf[block.hf_name]))
    return tensor


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (16, 2), (8, 1)])
def test_query_groups_are_those_of_a_slow_loop(heads: int, groups: int) -> None:
    (shape, blocks), hf = attention(heads, groups)
    config: Any = SimpleNamespace(
        kv_channels=HEAD, num_query_groups=groups, num_attention_heads=heads
    )
    apart = split_qkv_gate(fill(blocks, hf, shape), config)
    assert apart.keys() == hf.keys()
    assert all(torch.equal(apart[name], hf[name]) for name in hf)


def test_rows_are_a_concatenation() -> None:
    (shape, blocks), hf = gate_up()
    assert torch.equal(fill(blocks, hf, shape), torch.cat([hf["gate"], hf["up"]]))


def test_experts_are_a_stack() -> None:
    (shape, blocks), hf = experts(5)
    expected = torch.stack([torch.cat([hf[f"gate{e}"], hf[f"up{e}"]]) for e in range(5)])
    assert torch.equal(fill(blocks, hf, shape), expected)


@pytest.mark.parametrize("case", ["vector", "matrix", "stacked experts"])
def test_what_is_the_same_on_both_sides(case: str) -> None:
    (shape, blocks), hf = CASES[case]
    assert torch.equal(fill(blocks, hf, shape), hf["w"])


@each_case
def test_reading_back_gives_every_number_once(case: str) -> None:
    (shape, blocks), hf = CASES[case]
    megatron = fill(blocks, hf, shape)
    assert sorted(megatron.flatten().tolist()) == list(range(megatron.numel()))
    back = {name: torch.full_like(tensor, -1) for name, tensor in hf.items()}
    for block in blocks:
        block.hf_view(back[block.hf_name]).copy_(block.megatron_view(megatron))
    assert all(torch.equal(back[name], hf[name]) for name in hf)


@each_case
def test_views_share_memory(case: str) -> None:
    (shape, blocks), hf = CASES[case]
    megatron = torch.zeros(shape)
    for block in blocks:
        for view, whole in (
            (block.megatron_view(megatron), megatron),
            (block.hf_view(hf[block.hf_name]), hf[block.hf_name]),
        ):
            assert view.shape == block.hf_shape
            assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def grid(shape: Shape, draw: random.Random) -> list[tuple[Shape, Shape]]:
    """Cut every axis at random places; start and shape of each part."""
    axes = []
    for size in shape:
        inner = draw.sample(range(1, size), min(draw.randrange(4), size - 1))
        axes.append(list(pairwise([0, *sorted(inner), size])))
    boxes = product(*axes)
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in boxes]


def overlap(a: tuple[Shape, Shape], b: tuple[Shape, Shape]) -> int:
    """Numbers that two boxes have in common, axis by axis."""
    per_axis = zip(*a, *b, strict=True)
    return prod(len(range(max(s, t), min(s + n, t + m))) for s, n, t, m in per_axis)


@each_case
@pytest.mark.parametrize("seed", range(4))
def test_part_by_part_is_the_whole(case: str, seed: int) -> None:
    (shape, blocks), hf = CASES[case]
    entry = Entry("w", shape, blocks, {})
    whole = torch.full(shape, -1)
    parts = grid(shape, random.Random(seed))
    for start, size in parts:
        # Not of the whole and -1 outside the blocks: nothing may be written beyond the part.
        part = fill(entry.clip(start, size), hf, size, start)
        whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = part
        clipped = [c for block in blocks if (c := block.clip(start, size)) is not None]
        assert entry.clip(start, size) == clipped  # the search over the first axis misses none
    assert torch.equal(whole, fill(blocks, hf, shape))


@each_case
@pytest.mark.parametrize("seed", range(4))
def test_clip_is_the_intersection(case: str, seed: int) -> None:
    (shape, blocks), _ = CASES[case]
    for part in grid(shape, random.Random(100 + seed)):
        for block in blocks:
            expected = overlap((block.megatron_start, block.megatron_shape), part)
            clipped = block.clip(*part)
            if clipped is None:
                assert expected == 0
            else:
                assert prod(clipped.hf_shape) == prod(clipped.megatron_shape) == expected
                assert overlap((clipped.megatron_start, clipped.megatron_shape), part) == expected


@pytest.mark.parametrize("shape", [(7,), (7, 5), (6, 4, 2), (1, 9), (64, 1)])
@pytest.mark.parametrize("max_numbers", [1, 4, 10, 16, 1000])
def test_cut_partitions_the_first_axis(shape: Shape, max_numbers: int) -> None:
    whole = torch.arange(prod(shape)).reshape(shape)
    parts = cut(shape, max_numbers)
    pieces = [whole[tuple(slice(a, a + n) for a, n in zip(*part, strict=True))] for part in parts]
    assert torch.equal(torch.cat(pieces), whole)
    row = prod(shape[1:])
    assert all(prod(size) <= max(max_numbers, row) for _, size in parts)
    # As few parts as that bound allows.
    assert len(parts) == -(-shape[0] // max(max_numbers // row, 1))


@each_case
def test_tiling_is_checked(case: str) -> None:
    (shape, blocks), _ = CASES[case]
    check_tiling(shape, blocks)
    for i in range(len(blocks)):
        with pytest.raises(AssertionError):  # a gap
            check_tiling(shape, [*blocks[:i], *blocks[i + 1 :]])
        with pytest.raises(AssertionError):  # an overlap
            check_tiling(shape, [*blocks[:i], blocks[i], *blocks[i:]])


def test_blocks_of_other_sizes_on_both_sides_are_refused() -> None:
    with pytest.raises(AssertionError):
        check_tiling((4, 5), [Block("w", (0, 0), (3, 5), (0, 0), (4, 5))])
    with pytest.raises(AssertionError):
        check_tiling((5, 5), [Block("w", (0, 0), (4, 5), (0, 0), (4, 5))])
