"""Routing metrics by hand and their bounds."""

import math

import pytest
import torch

from trinity_megatron.telemetry.metrics import (
    DEAD_EXPERT_WINDOW,
    batch_heterogeneity,
    count_idle_steps,
    load_entropy,
    load_share,
    logit_metrics,
    max_violation,
    num_dead_experts,
    routing_metrics,
)
from trinity_megatron.telemetry.step_statistics import STATISTIC_NAMES


def test_by_hand() -> None:
    counts = torch.tensor([[4, 3, 1, 8], [4, 4, 4, 4], [0, 0, 16, 0], [0, 0, 0, 0]])
    # (max - mean) / mean with a mean of 4.
    assert max_violation(counts).tolist() == [1.0, 0.0, 3.0, 0.0]
    assert num_dead_experts(counts).tolist() == [0, 0, 3, 4]
    assert load_share(counts)[0].tolist() == [1.0, 0.75, 0.25, 2.0]
    assert load_share(counts)[3].tolist() == [0.0] * 4


def test_invariants() -> None:
    counts = torch.randint(0, 1000, (5, 64), generator=torch.Generator().manual_seed(0))
    violation = max_violation(counts)
    # A power of two and an order change no digit: sums of integers are exact in float64.
    assert torch.equal(max_violation(8 * counts), violation)
    assert torch.equal(max_violation(counts.flip(-1)), violation)
    assert torch.equal(load_share(counts).max(-1).values - 1, violation) or torch.allclose(
        load_share(counts).max(-1).values - 1, violation, rtol=1e-12
    )
    # Total collapse of top-4 of 64: each token counts once for each of the same four experts.
    collapsed = torch.zeros(64, dtype=torch.int64)
    collapsed[:4] = 1000
    assert max_violation(collapsed).item() == 64 / 4 - 1


def test_entropy() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    assert load_entropy(counts).tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0], abs=1e-12)


def test_an_expert_is_dead_after_a_window_of_steps() -> None:
    idle = torch.zeros(1, 3, dtype=torch.int64)
    for step in range(DEAD_EXPERT_WINDOW):
        # The second rests in every other step, the third always.
        idle = count_idle_steps(idle, torch.tensor([[5, 5 * (step % 2), 0]]))
    assert idle.tolist() == [[0, 0, DEAD_EXPERT_WINDOW]]
    fine = torch.ones(1, 3)
    metrics = routing_metrics(torch.tensor([[5, 5, 0]]), fine, fine, idle)
    assert metrics["moe/dead_experts"] == metrics["moe/dead_experts_window"] == 1
    assert count_idle_steps(idle, torch.tensor([[0, 0, 1]])).tolist() == [[1, 1, 0]]


def test_batch_heterogeneity_by_hand() -> None:
    sums = torch.tensor([8.0, 6.0, 30.0, 0.0], dtype=torch.float64)
    tokens = torch.tensor([4.0, 2.0, 10.0, 0.0], dtype=torch.float64)
    # Losses 2, 3 and 3; the last has no token.
    assert batch_heterogeneity(sums, tokens).item() == pytest.approx(1 / 3)
    assert math.isnan(batch_heterogeneity(torch.zeros(2), torch.zeros(2)).item())


def test_routing_metrics_by_hand() -> None:
    counts = torch.tensor([[4, 3, 1, 8], [4, 4, 4, 4]])
    bias = torch.tensor([[0.3, -0.1, -0.1, -0.1], [0.0, 0.5, -0.5, 0.0]])
    momentum = torch.full((2, 4), 2e-3)
    metrics = routing_metrics(counts, bias, momentum, torch.zeros(2, 4))
    expected = {
        "moe/max_violation": 1.0,
        "moe/mean_max_violation": 0.5,
        "moe/load_min": 0.25,
        "moe/load_q10": (0.25 + 0.3 * 0.5 + 1.0) / 2,  # 0.3 of the way from 0.25 to 0.75
        "moe/load_median": (0.875 + 1.0) / 2,
        "moe/load_q90": (2.0 - 0.3 * 1.0 + 1.0) / 2,
        "moe/load_max": 2.0,
        "moe/dead_experts": 0.0,
        "moe/dead_experts_window": 0.0,
        "moe/bias_max_abs": 0.5,
        "moe/bias_range": 1.0,
        "moe/bias_norm": math.sqrt((0.09 + 0.03 + 0.5) / 8),
        "moe/bias_momentum_norm": 2e-3,
    }
    # fp32 bias.
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    shares = [n / 16 for n in (4, 3, 1, 8)]
    entropy = -sum(p * math.log(p) for p in shares) / math.log(4)
    assert metrics["moe/load_entropy_min"] == pytest.approx(entropy)
    assert metrics["moe/load_entropy"] == pytest.approx((1 + entropy) / 2)


def test_logit_metrics() -> None:
    table = torch.zeros(len(STATISTIC_NAMES), 3, 3, dtype=torch.float64)
    table[..., 2] = -math.inf
    layers = [torch.randn(50, dtype=torch.float64) for _ in range(2)]
    for layer, values in enumerate(layers, start=1):
        for name, seen in (("router/logit", values), ("router/logit_square", values**2)):
            row = torch.stack([torch.tensor(50.0).double(), seen.sum(), values.max()])
            table[STATISTIC_NAMES.index(name), layer] = row
    table[STATISTIC_NAMES.index("lm_head/logsumexp_square"), 0] = torch.tensor([4.0, 36.0, 5.0])
    metrics = logit_metrics(table, z_loss_coeff=1e-3)
    together = torch.cat(layers)
    assert metrics["router/max_logit"] == together.max()
    assert metrics["router/mean_logit"] == pytest.approx(together.mean().item())
    assert metrics["router/logit_std"] == pytest.approx(together.std(correction=0).item())
    assert metrics["lm_head/z_loss"] == pytest.approx(9e-3)
    # Nothing was seen of the attention and of the LM head's logits.
    assert not {"attention/max_logit_bound", "lm_head/max_logit", "lm_head/mean_logit"} & set(
        metrics
    )
