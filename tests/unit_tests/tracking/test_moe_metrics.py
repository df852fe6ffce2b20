"""Routing metrics by hand and their bounds."""

import torch

from trinity_megatron.tracking.moe_metrics import load_share, max_violation, num_dead_experts


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
