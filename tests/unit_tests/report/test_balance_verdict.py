"""The verdict on runs whose state is known, and on runs balanced up to chance."""

import dataclasses

import numpy as np
import pytest

from tests.unit_tests.report.synthetic_run import bias_of, counts_of, expected_load
from trinity_megatron.report.balance_thresholds import THRESHOLDS
from trinity_megatron.report.balance_verdict import Verdict, judge_balance


def judge(load: np.ndarray, *, tokens: float = 1000.0, seed: int = 0, **more: object) -> Verdict:
    steps = np.arange(1, len(load) + 1)
    return judge_balance(steps, counts_of(load, tokens, seed=seed), topk=4, **more)  # type: ignore


def even(num_steps: int = 100, num_layers: int = 4, num_experts: int = 32) -> np.ndarray:
    return np.ones((num_steps, num_layers, num_experts))


@pytest.mark.parametrize("kind", ["balanced", "settling", "unbalanced", "drifting", "collapsing"])
@pytest.mark.parametrize("shape", [(60, 3, 32), (200, 16, 128)])
def test_each_kind_of_run_is_recognised(kind: str, shape: tuple[int, int, int]) -> None:
    load = expected_load(kind, *shape)
    verdict = judge(load, expert_bias=bias_of(load))
    assert verdict.state == kind
    assert verdict.headline.startswith(kind.capitalize() + ". ")
    first = shape[1] // 2  # where synthetic_run puts the trouble
    troubled = {f"MoE layer {first + index + 1}" for index in range(max(1, shape[1] // 8))}
    if kind in ("drifting", "collapsing"):
        assert {layer.name for layer in verdict.worst} == troubled
        assert {layer.name for layer in verdict.layers if layer.state == kind} == troubled
        assert verdict.worst[0].name in verdict.text
    assert (not verdict.worst) == (kind == "balanced")


def test_the_window_is_the_last_tenth() -> None:
    verdict = judge_balance(
        np.arange(10, 2010, 10), counts_of(even(200), 1000.0), layer_names=list("abcd")
    )
    assert (verdict.first_step, verdict.last_step, verdict.num_steps) == (1810, 2000, 20)
    assert [layer.name for layer in verdict.layers] == list("abcd")


@pytest.mark.parametrize("tokens", [0.5, 2.0, 8.0, 30.0])
@pytest.mark.parametrize("num_steps", [30, 100])
def test_chance_is_not_called_drift(tokens: float, num_steps: int) -> None:
    # 54 layers give every run many occasions for a false alarm.
    load = even(num_steps, num_layers=54)
    states = [judge(load, tokens=tokens, seed=seed).state for seed in range(5)]
    assert states == ["balanced"] * 5


def test_a_smaller_batch_is_not_called_drift() -> None:
    load = even()
    counts = np.concatenate([counts_of(load[:60], 2000.0), counts_of(load[60:], 40.0)])
    assert judge_balance(np.arange(100), counts).state == "balanced"


def test_bursts_are_not_called_drift() -> None:
    # In some steps one expert gets four times its share, as often at the end as at the start.
    generator = np.random.default_rng(0)
    load = even(num_layers=54)
    load[..., 3] = np.where(generator.random((100, 54)) < 0.12, 4.0, 1.0)
    load /= load.mean(axis=-1, keepdims=True)
    assert judge(load).state != "drifting"
    without_errors = dataclasses.replace(THRESHOLDS, drift_errors=0.0)
    assert judge(load, thresholds=without_errors).state == "drifting"


def test_a_rise_that_went_away_is_not_called_drift() -> None:
    load = even()
    load[40:60, 1, 3] = 4.0
    assert judge(load).state == "balanced"
    load[90:, 1, 3] = 2.0  # and one that is there
    verdict = judge(load)
    assert verdict.state == "drifting"
    assert [layer.name for layer in verdict.worst] == ["MoE layer 2"]


def test_a_start_better_than_the_rest_is_not_called_drift() -> None:
    load = even()
    load[:10] = expected_load("unbalanced", 10, 4, 32) ** 0.5
    load[10:40] = expected_load("unbalanced", 30, 4, 32) ** 3
    load[40:] = expected_load("unbalanced", 60, 4, 32)
    assert judge(load).state == "unbalanced"


def test_too_short() -> None:
    verdict = judge(even(THRESHOLDS.min_steps - 1))
    assert verdict.state == "too short" and verdict.layers == ()
    assert (
        str(THRESHOLDS.min_steps) in verdict.text and str(THRESHOLDS.min_steps - 1) in verdict.text
    )
    assert judge(even(THRESHOLDS.min_steps)).state == "balanced"


@pytest.mark.parametrize(
    ("idle", "state"), [(0, "balanced"), (1, "unbalanced"), (3, "unbalanced"), (4, "collapsing")]
)
def test_idle_experts(idle: int, state: str) -> None:
    # Few enough that the others' MaxVio stays below every limit.
    load = even()
    load[:, 2, :idle] = 1e-4
    verdict = judge(load)
    assert verdict.state == state
    assert [layer.idle for layer in verdict.layers] == [0, 0, idle, 0]
    assert ("no expert was idle" if idle == 0 else f"{idle} of ") in verdict.text


def test_idle_is_not_said_where_chance_would_do_it() -> None:
    assert all(layer.idle == 0 for layer in judge(even(30), tokens=0.1).layers)


def test_a_bias_that_grows_without_end_is_drift() -> None:
    load, direction = even(), np.linspace(-1, 1, 32)
    time = np.linspace(0, 1, 100)[:, None, None]
    grows = np.broadcast_to(0.6 * time * direction, load.shape)
    assert judge(load, expert_bias=grows).state == "drifting"
    assert "bias keeps growing" in judge(load, expert_bias=grows).text
    levels_off = np.broadcast_to(0.6 * (1 - np.exp(-time / 0.2)) * direction, load.shape)
    assert judge(load, expert_bias=levels_off).state == "balanced"
    assert judge(load, expert_bias=grows / 3).state == "balanced"  # still small


def test_the_first_phase_is_not_called_collapse_while_the_bias_builds_up() -> None:
    load = expected_load("unbalanced", 60, 3, 32) ** 3
    assert judge(load).state == "collapsing"
    direction = np.linspace(-1, 1, 32)
    bias = np.broadcast_to(np.linspace(0, 0.1, 60)[:, None, None] * direction, load.shape)
    assert judge(load, expert_bias=bias).state == "settling"
    # A bias that is declared and never moves does not excuse it.
    assert judge(load, expert_bias=np.zeros_like(load)).state == "collapsing"
    load[:30] = 1.0  # nor does one that moves in a run that has been balanced
    assert judge(load, expert_bias=bias).state == "collapsing"


def test_the_order_of_experts_and_layers_does_not_matter() -> None:
    load = expected_load("drifting", 60, 8, 32)
    counts = counts_of(load, 1000.0)
    generator = np.random.default_rng(3)
    experts, layers = generator.permutation(32), generator.permutation(8)
    names = [f"layer {index}" for index in range(8)]
    one = judge_balance(np.arange(60), counts, layer_names=names)
    moved = counts[:, layers][:, :, experts]
    other = judge_balance(np.arange(60), moved, layer_names=[names[index] for index in layers])
    assert (one.state, one.text) == (other.state, other.text)
    for layer in one.layers:
        (same,) = (found for found in other.layers if found.name == layer.name)
        assert experts[same.busiest] == layer.busiest
        assert dataclasses.replace(same, busiest=layer.busiest) == dataclasses.replace(
            layer, bias_range=same.bias_range
        )


def test_a_step_without_tokens() -> None:
    counts = counts_of(even(40), 100.0)
    counts[-5:] = 0
    assert judge_balance(np.arange(40), counts).state == "balanced"
