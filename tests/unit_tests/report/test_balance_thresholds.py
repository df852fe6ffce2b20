"""Thresholds: each has a reason, and the page names what decides."""

import ast
import dataclasses
import inspect

import numpy as np
import pytest

from trinity_megatron.report.balance_thresholds import THRESHOLDS, Thresholds, describe_rules
from trinity_megatron.report.balance_verdict import judge_balance

# Not named on the page: what the rules call the last tenth, and a guard against chance.
UNNAMED = {"window_share", "min_idle_tokens"}


def test_the_limit_of_collapse_follows_the_largest_possible_violation() -> None:
    assert THRESHOLDS.collapse_limit(256, 4) == 63 / 4
    assert THRESHOLDS.collapse_limit(8, 2) == THRESHOLDS.collapse_limit(8, None) == 2.0


def test_the_rules_name_the_limits() -> None:
    text = " ".join(describe_rules(256, 4))
    for words in ("256 / 4 - 1 = 63", "at most 0.5", "at most 1,", "1.5 times", "10%", "Below 30"):
        assert words in text


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Thresholds)])
def test_the_rules_follow_the_threshold(field: str) -> None:
    changed = dataclasses.replace(THRESHOLDS, **{field: 0.375})
    is_named = describe_rules(256, 4, thresholds=changed) != describe_rules(256, 4)
    assert is_named == (field not in UNNAMED)


def test_every_threshold_has_a_reason() -> None:
    (definition,) = ast.parse(inspect.getsource(Thresholds)).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    fields = [index for index, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(Thresholds))
    for index in fields:
        below = body[index + 1]
        assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        assert isinstance(below.value.value, str) and len(below.value.value) > 20


EXPERTS = 32


def judge_windows(violations: list[list[float]], ranges: list[float] | None = None) -> str:
    """State of a run with these MaxVio, ``[10 windows of 10 steps][layer]``, without chance.

    ``ranges``: of the bias of every layer, in the ten windows.
    """
    largest = np.repeat(np.array(violations), 10, axis=0)  # [steps, layers]
    load = np.repeat((1 - largest / (EXPERTS - 1))[..., None], EXPERTS, axis=-1)
    load[..., 3] = 1 + largest
    bias = np.zeros_like(load)
    if ranges is not None:
        bias[..., 3] = np.repeat(ranges, 10)[:, None]
    counts = 1e11 * load  # so many that MaxVio beyond chance is MaxVio
    return judge_balance(np.arange(100), counts, expert_bias=bias, topk=4).state


def one_layer(*violations: float) -> list[list[float]]:
    return [[violation] for violation in violations]


@pytest.mark.parametrize(
    ("largest", "state"), [(0.98, "balanced"), (1.02, "unbalanced")], ids=["below", "above"]
)
def test_layer_limit(largest: float, state: str) -> None:
    assert judge_windows([[0.1, 0.1, largest * THRESHOLDS.layer_limit, 0.1]] * 10) == state


@pytest.mark.parametrize(
    ("low", "last", "state"),
    [
        (0.6, 0.6 * 1.48, "balanced"),
        (0.6, 0.6 * 1.52, "drifting"),  # drift_ratio
        (0.1, 0.1 + 0.19, "balanced"),
        (0.1, 0.1 + 0.21, "drifting"),  # drift_rise
    ],
)
def test_drift_ratio_and_drift_rise(low: float, last: float, state: str) -> None:
    assert judge_windows([[low, 0.0, 0.0]] * 9 + [[last, 0.0, 0.0]]) == state


@pytest.mark.parametrize(("part", "state"), [(0.88, "balanced"), (0.92, "drifting")])
def test_drift_peak(part: float, state: str) -> None:
    assert (
        judge_windows(one_layer(0.1, 0.1, 0.1, 0.1, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5 * part)) == state
    )


@pytest.mark.parametrize(("part", "state"), [(0.82, "unbalanced"), (0.78, "settling")])
def test_recovery_ratio(part: float, state: str) -> None:
    assert judge_windows(one_layer(*[1.5] * 8, 1.4, 1.5 * part)) == state


@pytest.mark.parametrize(("part", "state"), [(0.72, "balanced"), (0.78, "drifting")])
def test_bias_linearity(part: float, state: str) -> None:
    middle = [0.1, 0.1, 0.2, 0.3, 0.4, 0.5]  # grows by 0.4 in four windows
    last = [0.5, 0.5, 0.5, 0.5 + 0.4 * part]
    assert judge_windows(one_layer(*[0.1] * 10), middle + last) == state


@pytest.mark.parametrize(("part", "state"), [(0.18, "collapsing"), (0.22, "settling")])
def test_bias_growth(part: float, state: str) -> None:
    ranges = [0.05 * (1 - part)] * 9 + [0.05]
    assert judge_windows(one_layer(*[4.0] * 10), ranges) == state
