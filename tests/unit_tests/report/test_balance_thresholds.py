"""Thresholds: each has a reason, and the page names what decides."""

import ast
import dataclasses
import inspect

import pytest

from trinity_megatron.report.balance_thresholds import THRESHOLDS, Thresholds, describe_rules

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
