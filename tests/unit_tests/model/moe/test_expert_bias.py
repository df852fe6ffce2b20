"""The two bias rules against the report's equations, written as loops over floats."""

import math

import pytest
import torch

from trinity_megatron.model.moe.expert_bias import (
    BIAS_RULES,
    linear_update,
    scheduled_rate,
    sign_update,
    smebu_update,
)

RATES = {"update_rate": 0.1, "momentum": 0.5, "clamp_scale": 2.0}


def smebu_oracle(
    bias: list[float], moments: list[float], counts: list[int], rates: dict[str, float]
) -> tuple[list[float], list[float]]:
    """Report eq 23-28, one expert at a time."""
    mean = sum(counts) / len(counts)
    steps = [
        rates["update_rate"] * math.tanh(rates["clamp_scale"] * (mean - n) / mean) for n in counts
    ]
    middle = sum(steps) / len(steps)
    new = [
        rates["momentum"] * m + (1 - rates["momentum"]) * (step - middle)
        for m, step in zip(moments, steps, strict=True)
    ]
    return [b + m for b, m in zip(bias, new, strict=True)], new


def sign_oracle(bias: list[float], counts: list[int], rate: float) -> list[float]:
    """Report eq 19-22."""
    total, num = sum(counts), len(counts)
    moved = [
        b + rate * ((total > num * n) - (total < num * n))
        for b, n in zip(bias, counts, strict=True)
    ]
    return [b - sum(moved) / num for b in moved]


def test_smebu_by_hand() -> None:
    counts = torch.tensor([4, 3, 1, 8])
    bias, momentum = smebu_update(torch.zeros(4), torch.zeros(4), counts, **RATES)
    # Worked out by hand to six digits.
    expected = torch.tensor([-0.005040, 0.018065, 0.040217, -0.053242])
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-6)
    bias, _ = smebu_update(bias, momentum, counts, **RATES)
    expected = torch.tensor([-0.012601, 0.045163, 0.100542, -0.133105])
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-6)


def test_rules_equal_the_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    smebu = (torch.zeros(3, 16, dtype=torch.float64), torch.zeros(3, 16, dtype=torch.float64))
    sign = torch.zeros(3, 16, dtype=torch.float64)
    oracles = [([0.0] * 16, [0.0] * 16) for _ in range(3)]
    sign_oracles = [[0.0] * 16 for _ in range(3)]
    for _ in range(20):
        counts = torch.randint(0, 1000, (3, 16), generator=generator)
        smebu = smebu_update(*smebu, counts, **RATES)
        sign, _ = sign_update(sign, torch.zeros_like(sign), counts, update_rate=0.01)
        oracles = [
            smebu_oracle(*pair, row, RATES)
            for pair, row in zip(oracles, counts.tolist(), strict=True)
        ]
        sign_oracles = [
            sign_oracle(row, loads, 0.01)
            for row, loads in zip(sign_oracles, counts.tolist(), strict=True)
        ]
    # float64 in another order of summation.
    options = {"rtol": 1e-12, "atol": 1e-14}
    for index, name in enumerate(("bias", "momentum")):
        expected = torch.tensor([pair[index] for pair in oracles], dtype=torch.float64)
        torch.testing.assert_close(smebu[index], expected, **options, msg=name)
    torch.testing.assert_close(sign, torch.tensor(sign_oracles, dtype=torch.float64), **options)


@pytest.mark.parametrize("rule", ["smebu", "sign"])
def test_invariants(rule: str) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 5000, (2, 3, 32), generator=generator)
    bias = torch.randn(2, 3, 32, generator=generator) * 1e-2
    bias -= bias.mean(-1, keepdim=True)

    def update(loads: torch.Tensor, start: torch.Tensor = bias) -> torch.Tensor:
        if rule == "sign":
            return sign_update(start, torch.zeros_like(start), loads, update_rate=1e-3)[0]
        return smebu_update(start, torch.zeros_like(start), loads, **RATES)[0]

    moved = update(counts)
    # 32 fp32 numbers of the size of 0.1 sum to zero up to their rounding.
    assert moved.sum(-1).abs().max() < 1e-6
    # A power of two changes no digit of the quotients.
    assert torch.equal(update(2 * counts), moved)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        assert torch.equal(update(counts[tuple(index)], bias[tuple(index)]), moved[tuple(index)])
    busiest, idlest = counts.argmax(-1, True), counts.argmin(-1, True)
    step = moved - bias
    assert (step.gather(-1, busiest) < 0).all() and (step.gather(-1, idlest) > 0).all()


def test_a_layer_without_tokens() -> None:
    none, bias = torch.zeros(4, dtype=torch.int64), torch.tensor([0.3, -0.1, -0.1, -0.1])
    momentum = torch.tensor([0.2, 0.0, -0.1, -0.1])
    new_bias, new_momentum = smebu_update(bias, momentum, none, **RATES)
    assert torch.equal(new_momentum, momentum / 2)
    assert torch.equal(new_bias, bias + momentum / 2)
    # The mean of these is zero up to one rounding.
    moved, _ = sign_update(bias, torch.zeros(4), none, update_rate=0.1)
    torch.testing.assert_close(moved, bias, rtol=0, atol=1e-7)


@pytest.mark.parametrize("base", [2**54, 2048 * 2**20])
def test_sign_is_exact_in_integers(base: int) -> None:
    # Above 2**53 a mean in float64 would not tell these loads from each other; the second is the
    # sum over 2048 ranks with a million tokens each, where fp32 would not.
    counts = torch.tensor([base + 1, base - 1, base, base])
    bias, _ = sign_update(torch.zeros(4), torch.zeros(4), counts, update_rate=1.0)
    assert bias.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_linear_is_smebu_without_the_clamp() -> None:
    counts = torch.tensor([4, 3, 1, 8])
    zero = torch.zeros(4, dtype=torch.float64)
    bias, momentum = linear_update(zero, zero, counts, **RATES)
    # Half (1 - beta) of 0.1 x 2 x (4 - n) / 4.
    torch.testing.assert_close(bias, torch.tensor([0.0, 0.025, 0.075, -0.1], dtype=torch.float64))
    assert torch.equal(bias, momentum)
    # For small violations tanh is the identity: the rules meet, to the third power of kappa v.
    nearly = torch.tensor([1000, 1001, 999, 1000])
    clamped, _ = smebu_update(zero, zero, nearly, **RATES)
    linear, _ = linear_update(zero, zero, nearly, **RATES)
    torch.testing.assert_close(clamped, linear, rtol=1e-5, atol=0)


def test_sign_with_momentum_averages_the_steps() -> None:
    bias, momentum = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    up, down = torch.tensor([1, 1, 3, 3]), torch.tensor([3, 3, 1, 1])
    sizes = []
    for counts in (up, up, down, up, down):
        bias, momentum = sign_update(bias, momentum, counts, update_rate=0.1, momentum=0.5)
        sizes.append(round(momentum[0].item(), 9))
    # m <- m / 2 + (+-0.1) / 2, by hand.
    assert sizes == [0.05, 0.075, -0.0125, 0.04375, -0.028125]
    assert bias.sum().abs() < 1e-15


@pytest.mark.parametrize("rule", BIAS_RULES)
def test_every_rule_has_one_signature(rule: str) -> None:
    counts = torch.tensor([4, 3, 1, 8])
    bias, momentum = BIAS_RULES[rule](torch.zeros(4), torch.zeros(4), counts, **RATES)
    assert bias.shape == momentum.shape == (4,)
    assert bool(bias.any()) == (rule != "none")


def test_warm_up_of_the_rate() -> None:
    rates = [scheduled_rate(0.4, step=step, warmup_steps=4) for step in (1, 2, 3, 4, 5, 10**9)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert scheduled_rate(0.4, step=1, warmup_steps=0) == 0.4
