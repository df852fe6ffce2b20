"""What a part of gpu-check may call passed."""

import pytest

from trinity_megatron.doctor.result import PartResult, Table


def make(*rows: tuple[str, ...], skipped: list[str]) -> PartResult:
    return PartResult("part", skipped=skipped, tables=[Table("", ("test",), rows)])


@pytest.mark.parametrize("skipped", [["a: no time", "b: no time"], []])
def test_a_part_of_which_nothing_ran_is_skipped(skipped: list[str]) -> None:
    result = make(skipped=skipped)
    result.close()
    assert result.status == "skipped" and result.skipped == []
    assert result.reason == ("; ".join(skipped) or "nothing of it ran")


def test_a_part_of_which_something_ran_is_passed() -> None:
    result = make(("a",), skipped=["b: no time"])
    result.close()
    assert (result.status, result.reason, result.skipped) == ("passed", "", ["b: no time"])


def test_a_failure_stays_one() -> None:
    result = make(skipped=["b: no time"])
    result.fail("a: exit code 1")
    result.close()
    assert (result.status, result.reason) == ("failed", "a: exit code 1")
