"""The planner against published runs, and the document that lists them."""

from pathlib import Path

import pytest

from trinity_megatron.planner.published import Comparison, compare_all, render

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "planner.md"


@pytest.fixture(scope="module")
def held() -> list[Comparison]:
    return [row for row in compare_all() if not row.is_further]


def test_throughput_is_within_15_percent(held: list[Comparison]) -> None:
    rows = [row for row in held if row.quantity == "tokens_per_second_per_gpu"]
    assert len(rows) == 8
    assert sum(abs(row.error) <= 0.15 for row in rows) >= 7


def test_memory_is_within_10_percent(held: list[Comparison]) -> None:
    rows = [row for row in held if row.quantity == "memory_gib"]
    assert len(rows) == 6
    assert max(abs(row.error) for row in rows) <= 0.10


def test_learned_routing_is_within_the_band(held: list[Comparison]) -> None:
    """Published of the same layouts: throughput with learned routing over that with forced."""
    for model, gpu, learned in (
        ("Qwen3-30B-A3B", "h100", 0.67),
        ("Mixtral-8x22B", "h100", 445 / 465),
    ):
        plan = next(
            row.plan
            for row in held
            if (row.model, row.plan.gpu.name) == (model, gpu) and row.quantity != "memory_gib"
        )
        low, high = (rate / plan.time.tokens_per_second_per_gpu for rate in plan.learned)
        assert low < learned < high


def test_the_worst_comes_first(held: list[Comparison]) -> None:
    errors = [abs(row.error) for row in held]
    assert errors == sorted(errors, reverse=True)


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), (
        "Remedy: python -m trinity_megatron.planner.published > docs/planner.md"
    )
