"""Plans against the objects of a training, built without a network and without memory."""

from dataclasses import replace
from typing import Any

import pytest

from tests.functional_tests.launch import TAKES_ALL
from trinity_megatron.errors import UserError
from trinity_megatron.planner.dry_world import (
    build_rank,
    count_model,
    planned_parameters,
    planned_terms,
    sample_ranks,
    verify_plan,
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
HSDP: dict[str, Any] = {"sharding": "hsdp", "shard_size": 8}
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
    ("large", 2048, {EP: 8, "sharding": "hsdp", "shard_size": 128}),
]


def make_plan(name: str, gpus: int, sizes: dict[str, Any], optimizer: str = "muon") -> Plan:
    model = describe_model(name)
    layout = Layout(world_size=gpus, global_batch_size=8 * gpus, seq_length=512, **sizes)
    check_layout(model, layout)
    return Plan(model, layout, load_rates(get_gpu("b300"), own=True), optimizer)


def compare(plan: Plan, rank: int, tolerance: float) -> None:
    built = build_rank(plan, rank)
    for name, planned in planned_terms(plan.memory[built.stage]).items():
        assert planned == pytest.approx(getattr(built.held, name), rel=tolerance), (name, rank)


@pytest.mark.parametrize(
    ("sizes", "optimizer"),
    [
        ({EP: 4, PP: 2}, "muon"),
        ({EP: 4, PP: 2}, "adam"),
        ({TP: 2, ETP: 1, EP: 2}, "muon"),
        ({TP: 2, ETP: 1, EP: 2}, "adam"),
        ({PP: 2, VP: 2, "grad_reduce_bytes": 2}, "muon"),
        ({PP: 2, VP: 2, "grad_reduce_bytes": 2}, "adam"),
        ({EP: 2, **HSDP}, "muon"),
        ({EP: 2, **HSDP, "outer_shard": True, "grad_reduce_bytes": 2}, "adam"),
    ],
)
def test_plan_is_what_ranks_of_tiny_hold(sizes: dict[str, Any], optimizer: str) -> None:
    plan = make_plan("tiny", 16, sizes, optimizer)
    # The last rank's shards are filled up: some KiB of a tiny model, more in each finer shard.
    tolerance = 0.05 if plan.layout.outer_shard else 0.02
    for rank in (0, 15):
        compare(plan, rank, tolerance)


def test_ranks_of_tiny_add_up_to_the_model() -> None:
    plan = make_plan("tiny", 8, {EP: 2, PP: 2})
    ranks = [build_rank(plan, rank) for rank in range(8)]
    # One data-parallel replica of each stage: its dense part once, its experts from two ranks.
    whole = sum(rank.dense for rank in ranks[::4]) + sum(
        rank.experts for stage in (0, 4) for rank in ranks[stage : stage + 2]
    )
    assert count_model(plan.layout, ranks) == whole
    assert sample_ranks(plan.layout) == [0, 2, 3, 4, 6, 7]


@pytest.mark.parametrize(
    "sizes", [{TP: 2, ETP: 1, EP: 4, PP: 2}, {TP: 2, ETP: 2, EP: 2}, {EP: 2, **HSDP}]
)
def test_a_rank_knows_the_size_of_its_stage(sizes: dict[str, Any]) -> None:
    plan = make_plan("tiny", 16, sizes)
    ranks = [build_rank(plan, rank) for rank in (0, 15)]
    assert count_model(plan.layout, ranks) == planned_parameters(plan.model)


def test_what_is_not_as_planned_is_said() -> None:
    plan = make_plan("tiny", 8, {EP: 2})
    assert verify_plan(plan).holds
    larger = replace(plan, model=replace(plan.model, moe_ffn_hidden_size=256))
    found = verify_plan(larger)
    assert not found.holds and found.worst > 0.05
    assert found.lines[-1].startswith("  NOT as planned: the largest difference of a term is ")


@pytest.mark.parametrize(
    "sizes", [{"moment_bytes": 2}, {"fp8_recipe": "mxfp8"}], ids=["moments", "FP8"]
)
def test_what_needs_transformer_engine_is_refused(sizes: dict[str, Any]) -> None:
    plan = make_plan("large", 2048, {EP: 8, **sizes})
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
