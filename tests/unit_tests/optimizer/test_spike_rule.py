"""Which loss or gradient norm is a spike."""

import math

import numpy as np
import pytest

from trinity_megatron.optimizer.spike_rule import SpikeRule


def test_it_agrees_with_numpy() -> None:
    """Against the definition, on noise with spikes of all heights."""
    rng = np.random.default_rng(1)
    rule, window, sigma = SpikeRule(sigma=3.0, window=16), 16, 3.0
    kept: list[tuple[float, float]] = []
    num_spikes = 0
    for step in range(400):
        loss, norm = 4 + rng.normal() * 0.1, abs(rng.normal()) + 0.2
        if step > 20 and rng.random() < 0.1:
            loss += rng.exponential(0.5)
        past = np.array(kept[-window:])
        expected = False
        if len(past) >= window // 2:
            limits = past.mean(0) + sigma * past.std(0, ddof=1)
            expected = bool((np.array([loss, norm]) > limits).any())
        assert (rule.judge(loss, norm) is not None) == expected, step
        num_spikes += expected
        if not expected:
            kept.append((loss, norm))
    assert 10 < num_spikes < 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_is_a_spike_from_the_first_step(bad: float) -> None:
    rule = SpikeRule(sigma=6.0, window=8)
    assert "its loss is" in (rule.judge(bad, 1.0) or "")
    assert "its gradient norm is" in (rule.judge(1.0, bad) or "")
    assert rule.state_dict() == {"loss": [], "gradient norm": []}


def test_lower_values_are_no_spikes_and_a_level_is_learned() -> None:
    rule = SpikeRule(sigma=2.0, window=8)
    for value in (5.0, 5.1, 4.9, 5.05, 1.0, 0.1):
        assert rule.judge(value, 1.0) is None
    for _ in range(20):  # one spike does not hide the next
        assert rule.judge(100.0, 1.0) is not None


def test_a_step_without_loss_has_its_norm_judged() -> None:
    rule = SpikeRule(sigma=2.0, window=8)
    for norm in (1.0, 1.1, 0.9, 1.0):
        assert rule.judge(None, norm) is None
    assert "gradient norm 9" in (rule.judge(None, 9.0) or "")


def test_a_saved_window_goes_on() -> None:
    first = SpikeRule(sigma=2.0, window=8)
    for value in np.random.default_rng(0).normal(3, 0.1, 12):
        first.judge(float(value), float(value))
    second = SpikeRule(sigma=2.0, window=8)
    second.load_state_dict(first.state_dict())
    shorter = SpikeRule(sigma=2.0, window=4)
    shorter.load_state_dict(first.state_dict())
    assert shorter.state_dict()["loss"] == first.state_dict()["loss"][-4:]
    for value in (3.1, 3.4, 2.9, 3.2):
        assert first.judge(value, value) == second.judge(value, value)
