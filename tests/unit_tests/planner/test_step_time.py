"""Time and memory of a step against schedules that are played through, and sums done by hand."""

from dataclasses import replace

import pytest

from trinity_megatron.planner.activations import layer_activations
from trinity_megatron.planner.constants import CONSTANTS
from trinity_megatron.planner.context_exchange import gathered_bytes, sent_bytes
from trinity_megatron.planner.hardware import get_gpu
from trinity_megatron.planner.kernels.tables import load_rates
from trinity_megatron.planner.layer_time import LayerModel, attention_pairs, moe_layer
from trinity_megatron.planner.layout import Layout, divide_layers
from trinity_megatron.planner.model_description import describe_model
from trinity_megatron.planner.plan import Plan, best_changes, fp8_gain
from trinity_megatron.planner.routing import rank_imbalance
from trinity_megatron.planner.step_memory import in_flight, stage_memory
from trinity_megatron.planner.step_time import StepModel, step_time

B300 = get_gpu("b300")


def make_plan(name: str = "large", **sizes: object) -> Plan:
    model = describe_model(name)
    values = {"global_batch_size": 12288, "transformer_impl": "local", **sizes}
    layout = Layout(**values)  # type: ignore[arg-type]
    return Plan(model, layout, load_rates(B300, own=True), model.optimizer)


def held_by_schedule(layout: Layout, stage: int) -> int:
    """Chunks of micro-batches that a rank holds at most, its schedule played through."""
    pp, chunks, count = (
        layout.pipeline_model_parallel_size,
        layout.num_virtual_stages,
        layout.num_microbatches,
    )
    total = count * chunks
    warm_up = pp - stage - 1 if chunks == 1 else 2 * (pp - stage - 1) + (chunks - 1) * pp
    order = ["f"] * min(warm_up, total)
    for _ in range(total - len(order)):
        order += ["f", "b"]
    held = most = 0
    for step in order:
        held += 1 if step == "f" else -1
        most = max(most, held)
    return most


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("batches", [4, 8, 64])
def test_micro_batches_in_flight(chunks: int, batches: int) -> None:
    for stage in range(4):
        layout = Layout(
            world_size=4,
            pipeline_model_parallel_size=4,
            num_virtual_stages=chunks,
            global_batch_size=batches,
        )
        assert sum(in_flight(layout, stage)) == held_by_schedule(layout, stage)


def test_layers_are_divided_in_turns() -> None:
    model = describe_model("large")
    layout = Layout(world_size=4, pipeline_model_parallel_size=4, num_virtual_stages=3)
    ranks = divide_layers(model, layout)
    assert [chunk[0] for chunk in ranks[1]] == [5, 25, 45]
    assert sorted(layer for rank in ranks for chunk in rank for layer in chunk) == list(range(60))
    short = replace(model, num_layers=94)
    ranks = divide_layers(short, replace(layout, num_virtual_stages=12, account_for_ends=True))
    assert (ranks[0][0], ranks[3][11], len(ranks[1][0])) == ([0], [93], 2)


def test_pairs_of_a_window_are_counted_one_by_one() -> None:
    for length, window in ((16, None), (16, 5), (16, 16), (3, 9)):
        pairs = sum(min(i + 1, window or length) for i in range(length))
        assert attention_pairs(length, window) == pairs


def test_local_layers_exchange_and_keep_the_window() -> None:
    """Bytes of Large's layers by hand: 8 key heads of 128, windows of 4096, CP4."""
    plan = make_plan(world_size=64, context_parallel_size=4, expert_model_parallel_size=64)
    row, window = 2 * 8 * 128 * 2, 4096
    for length in (2**17, 2**18, 2**19):
        layout = plan.with_layout(seq_length=length).layout
        # A middle rank sends the last 4095 rows of both of its chunks.
        assert sent_bytes(plan.model, layout, 0) == 2 * (window - 1) * row
        kept = gathered_bytes(plan.model, layout, 0), gathered_bytes(plan.model, layout, 3)
        assert kept == ((length / 4 + 2 * (window - 1)) * row, length * row)
    times = [
        plan.with_layout(seq_length=length).time.terms["context_parallel"]
        for length in (2**17, 2**18)
    ]
    assert 0 < times[0] <= times[1]
    other = plan.with_layout(transformer_impl="transformer_engine").layout
    assert gathered_bytes(plan.model, other, 0) == 0


def test_bubble_is_that_of_the_schedule() -> None:
    plan = make_plan(world_size=512, pipeline_model_parallel_size=4, expert_model_parallel_size=8)
    flat = plan.time.terms["pipeline_bubble"]
    turns = plan.with_layout(num_virtual_stages=3).time.terms["pipeline_bubble"]
    assert flat == pytest.approx(3 * turns)
    # (p - 1) / m of the time of the micro-batches, if all stages were as the mean one.
    busy = sum(
        plan.time.terms[name] for name in ("matrices", "attention", "experts", "elementwise")
    )
    assert 0.5 * busy * 3 / 96 < flat < 1.5 * busy * 3 / 96


def test_work_is_shared_by_all_gpus() -> None:
    """Twice the GPUs halve the work that is not exchange; recomputation adds a forward pass."""
    one = make_plan(world_size=1024, expert_model_parallel_size=32)
    two = make_plan(world_size=2048, expert_model_parallel_size=32)
    for term in ("matrices", "attention", "experts", "elementwise", "lm_head"):
        assert one.time.terms[term] == pytest.approx(2 * two.time.terms[term])
    again = two.with_layout(recompute="full").time.terms
    forward = sum(moe_layer(two.step.parts, 9).forward.values())
    assert again["recomputation"] == pytest.approx(60 * 6 * forward, rel=0.1)


def test_overlap_hides_the_exchange_behind_computation() -> None:
    plan = make_plan(world_size=2048, expert_model_parallel_size=8)
    hidden = plan.with_layout(overlap_expert_all_to_all=True)
    before = plan.time.terms["expert_all_to_all"]
    assert hidden.time.terms["expert_all_to_all"] == pytest.approx(
        (1 - CONSTANTS.hidden) * before, rel=0.01
    )


def test_hsdp_is_bound_by_the_network_at_one_sequence() -> None:
    """sharding: 91.8 GB of experts a pass, 0.92 s at 100 GB/s without the network's overhead."""
    plan = make_plan(
        world_size=2048, expert_model_parallel_size=8, sharding="hsdp", shard_size=128,
        seq_length=8192, recompute="full",
    )  # fmt: skip
    many = plan.with_layout(micro_batch_size=3)
    gathering = plan.time.terms["parameter_gathering"] + plan.time.terms["gradient_reduction"]
    assert 6 * 2 * 0.92 < gathering < 6 * 6
    assert many.time.seconds < 0.6 * plan.time.seconds


def test_replicas_of_hsdp_exchange_their_parts_only() -> None:
    """A rank of a group of 128 holds 3.1 billion elements of Large, in any number of groups."""
    sizes = {
        "expert_model_parallel_size": 8, "sharding": "hsdp", "shard_size": 128, "seq_length": 8192,
    }  # fmt: skip
    few, many = (
        make_plan(world_size=gpus, global_batch_size=gpus, **sizes) for gpus in (256, 2048)
    )
    alone = make_plan(world_size=128, global_batch_size=128, **sizes)
    base = alone.time.terms["gradient_reduction"]
    extra = [plan.time.terms["gradient_reduction"] - base for plan in (few, many)]
    # Reduced and gathered in fp32 at the network's rate, beside the backward pass.
    whole = 2 * 4 * 398.6e9 / 128 / (CONSTANTS.network * 100e9) * (1 - CONSTANTS.hidden)
    assert extra == pytest.approx([whole / 2, whole * 15 / 16], rel=0.02)


def test_muon_repeats_newton_schulz_in_replicas() -> None:
    plan = make_plan(world_size=2048, expert_model_parallel_size=8, sharding="hsdp", shard_size=128)
    shared = plan.with_layout(outer_shard=True)
    assert plan.time.terms["muon"] == pytest.approx(16 * shared.time.terms["muon"])
    assert 0.005 < shared.time.terms["muon"] < 0.03  # 15 to 25 ms by the design
    assert "muon" not in replace(plan, optimizer="adam").time.terms


@pytest.mark.parametrize(
    ("sizes", "gib"),
    [
        ({"expert_model_parallel_size": 8}, 335),
        ({"expert_model_parallel_size": 8, "grad_reduce_bytes": 2}, 227),
        ({"expert_model_parallel_size": 16}, 193),
        ({"expert_model_parallel_size": 8, "sharding": "hsdp", "shard_size": 128}, 78),
    ],
)
def test_memory_of_rehearsals_of_large(sizes: dict[str, object], gib: float) -> None:
    """Allocated at the peak of a step, as rank 0 of 2048 was rehearsed (full recomputation)."""
    plan = make_plan(world_size=2048, seq_length=8192, recompute="full", **sizes)
    optimizer = "adam" if plan.layout.sharding == "hsdp" else "muon"
    memory = stage_memory(plan.model, plan.layout, B300, optimizer, 0)
    assert memory.peak / 2**30 == pytest.approx(gib, rel=0.10)


@pytest.mark.parametrize("name", ["nano", "mini", "large"])
def test_activations_are_those_of_the_whole_model(name: str) -> None:
    """The sums that a run prints when it is out of memory, for all layers of a model at once."""
    from trinity_megatron.model.presets import trinity_preset
    from trinity_megatron.planner.memory import activation_memory

    plan = make_plan(name, world_size=1)
    config = trinity_preset(name, bias_activation_fusion=True)
    whole = activation_memory(config, 4096, 2, range(config.num_layers), False)
    sums = sum(
        sum(layer_activations(plan.model, plan.layout, layer).values())
        for layer in range(config.num_layers)
    )
    # The sigmoid of the gate is kept in fp32 where Megatron's small functions are not compiled.
    assert sums == pytest.approx(sum(whole.values()), rel=0.15)


def test_learned_routing_waits_for_the_fullest_rank() -> None:
    plan = make_plan(world_size=2048, expert_model_parallel_size=8)
    low, high = plan.learned
    assert low < high < plan.time.tokens_per_second_per_gpu
    assert rank_imbalance(plan.model, replace(plan.layout, expert_model_parallel_size=1), 1) == 1
    wide = replace(plan.layout, expert_model_parallel_size=64)
    assert rank_imbalance(plan.model, wide, 1.0) > rank_imbalance(plan.model, plan.layout, 1.0)
    # Published: 0.57 of the throughput with EP64 of 256 experts (GB200, 26.04).
    assert (
        0.5
        < make_plan(world_size=2048, expert_model_parallel_size=64).learned[0]
        / (make_plan(world_size=2048, expert_model_parallel_size=64).time.tokens_per_second_per_gpu)
        < 0.8
    )


def test_changes_are_faster_and_fit() -> None:
    plan = make_plan(world_size=2048, expert_model_parallel_size=32, recompute="full")
    changes = best_changes(plan)
    assert changes and all(change.gain > 1 for change in changes)
    assert any("recompute" in change.flags or "recomputation" in change.flags for change in changes)


def test_fp8_pays_for_large_and_not_for_nano() -> None:
    for name, pays in (("large", True), ("nano", False)):
        plan = make_plan(name, world_size=256, expert_model_parallel_size=32, micro_batch_size=4)
        assert (fp8_gain(plan.with_layout(fp8_recipe="mxfp8")) > 1.05) is pays


def test_terms_add_up() -> None:
    plan = make_plan(world_size=2048, expert_model_parallel_size=32)
    time = step_time(StepModel(plan.model, plan.layout, plan.rates, "muon"))
    rate = time.tokens / time.seconds / 2048
    assert rate == time.tokens_per_second_per_gpu
    assert all(seconds >= 0 for seconds in time.terms.values())
    assert isinstance(plan.step.parts, LayerModel)
