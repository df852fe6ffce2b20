"""The plan of a sharded run: everything is held, every replica works, no expert moves."""

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.model.presets import get_preset, trinity_preset
from trinity_megatron.optimizer.sharded.ownership import newton_schulz_flops
from trinity_megatron.planner.fsdp_work import plan_sharded_muon

VOCABULARY = get_preset("nano").model["vocab_size"]


def plan(**sizes: int):
    return plan_sharded_muon(trinity_preset("nano"), VOCABULARY, **sizes)


def test_replicas_share_the_work_and_each_has_the_state() -> None:
    alone, shared = plan(world_size=8), plan(world_size=32, replicas=4)
    assert shared.flops.sum() == pytest.approx(alone.flops.sum(), rel=1e-12)
    assert shared.state_bytes.sum() == pytest.approx(4 * alone.state_bytes.sum(), rel=1e-12)
    assert shared.balance < 1.05


def test_the_work_is_that_of_all_matrices() -> None:
    config = trinity_preset("nano")
    width, hidden = config.moe_ffn_hidden_size, config.hidden_size
    moe_layers = config.num_layers - config.num_dense_layers
    of_experts = moe_layers * config.num_moe_experts * 3 * newton_schulz_flops(width, hidden)
    total = plan(world_size=16, replicas=2, expert_parallel=4).flops.sum()
    assert of_experts < total < 1.6 * of_experts


def test_replicas_send_results_and_nothing_else() -> None:
    """A single replica sends the pieces of cut dense matrices alone; more send each weight once."""
    config = trinity_preset("nano")
    one = plan(world_size=8).sent_bytes.sum()
    two = plan(world_size=16, replicas=2).sent_bytes.sum()
    moe_layers = config.num_layers - config.num_dense_layers
    elements = config.num_moe_experts * 3 * config.moe_ffn_hidden_size * config.hidden_size
    experts = moe_layers * elements * 2  # bytes of bfloat16
    assert experts < two < experts + 4 * one


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="replicas=3"):
        plan(world_size=8, replicas=3)
