"""Plans against the objects of a training, built without a network and without memory."""

from typing import Any

import pytest

from tests.functional_tests.launch import TAKES_ALL
from trinity_megatron.errors import UserError
from trinity_megatron.planner.dry_world import (
    build_rank,
    count_model,
    planned_terms,
    sample_ranks,
)
from trinity_megatron.planner.hardware import get_gpu
from trinity_megatron.planner.kernels.tables import load_rates
from trinity_megatron.planner.layout import Layout, check_layout
from trinity_megatron.planner.model_description import describe_model
from trinity_megatron.planner.plan import Plan

TP, PP, EP, ETP, VP, CP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_virtual_stages",
    "context_parallel_size",
)
LAYOUTS: list[tuple[str, int, dict[str, int]]] = [
    ("nano", 8, {EP: 8}),
    ("nano", 64, {EP: 8, PP: 2, VP: 2}),
    ("nano", 16, {EP: 4, TP: 2, ETP: 1}),
    ("nano", 16, {EP: 2, TP: 2, ETP: 2, PP: 4}),
    ("nano", 32, {EP: 16, CP: 2, "grad_reduce_bytes": 2}),
    ("mini", 8, {EP: 8}),
    ("mini", 32, {EP: 8, TP: 2, ETP: 2}),
    ("mini", 64, {EP: 16, PP: 4}),
    ("mini", 128, {EP: 32, PP: 2, VP: 4}),
    ("mini", 512, {EP: 8, TP: 4, ETP: 1, "grad_reduce_bytes": 2}),
    ("large", 256, {EP: 64, PP: 4}),
    ("large", 2048, {EP: 64, PP: 4}),
    ("large", 2048, {EP: 8, PP: 4, VP: 3}),
    ("large", 2048, {EP: 32}),
    ("large", 1024, {EP: 16, TP: 2, ETP: 1, PP: 2, VP: 5}),
]


def make_plan(name: str, gpus: int, sizes: dict[str, Any], optimizer: str = "muon") -> Plan:
    model = describe_model(name)
    layout = Layout(world_size=gpus, global_batch_size=8 * gpus, seq_length=512, **sizes)
    check_layout(model, layout)
    return Plan(model, layout, load_rates(get_gpu("b300"), own=True), optimizer)


def compare(plan: Plan, rank: int, tolerance: float) -> None:
    built = build_rank(plan, rank)
    for name, planned in planned_terms(plan.memory[built.stage]).items():
        assert planned == pytest.approx(getattr(built, name), rel=tolerance), (name, rank)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
@pytest.mark.parametrize(
    "sizes", [{EP: 4, PP: 2}, {TP: 2, ETP: 1, EP: 2}, {PP: 2, VP: 2, "grad_reduce_bytes": 2}]
)
def test_plan_is_what_ranks_of_tiny_hold(sizes: dict[str, Any], optimizer: str) -> None:
    plan = make_plan("tiny", 16, sizes, optimizer)
    for rank in (0, 15):
        # The distributed optimizer fills up the parts of ranks: some KiB of a tiny model.
        compare(plan, rank, 0.02)


def test_ranks_of_tiny_add_up_to_the_model() -> None:
    plan = make_plan("tiny", 8, {EP: 2, PP: 2})
    ranks = [build_rank(plan, rank) for rank in range(8)]
    # One data-parallel replica of each stage: its dense part once, its experts from two ranks.
    whole = sum(rank.dense for rank in ranks[::4]) + sum(
        rank.experts for stage in (0, 4) for rank in ranks[stage : stage + 2]
    )
    assert count_model(plan.layout, ranks) == whole
    assert sample_ranks(plan.layout) == [0, 2, 3, 4, 6, 7]


def test_other_models_are_refused() -> None:
    plan = make_plan("large", 2048, {EP: 8, "sharding": "hsdp", "shard_size": 128})
    with pytest.raises(UserError, match="Remedy: drop --verify"):
        build_rank(plan, 0)


@pytest.mark.skipif(not TAKES_ALL, reason="takes minutes; TRINITY_TESTS=all")
@pytest.mark.parametrize(("name", "gpus", "sizes"), LAYOUTS)
def test_plan_is_within_5_percent_of_dry_worlds(
    name: str, gpus: int, sizes: dict[str, int]
) -> None:
    plan = make_plan(name, gpus, sizes)
    for rank in sample_ranks(plan.layout)[::2]:
        compare(plan, rank, 0.05)


@pytest.mark.skipif(not TAKES_ALL, reason="takes a minute each; TRINITY_TESTS=all")
@pytest.mark.parametrize(("gpus", "sizes"), [(256, {EP: 64, PP: 4}), (2048, {EP: 8, PP: 4, VP: 3})])
def test_large_adds_up(gpus: int, sizes: dict[str, int]) -> None:
    """The second is the layout of examples/trinity_large."""
    plan = make_plan("large", gpus, sizes)
    ranks = [build_rank(plan, rank) for rank in sample_ranks(plan.layout)]
    assert count_model(plan.layout, ranks) == 398_635_286_016
