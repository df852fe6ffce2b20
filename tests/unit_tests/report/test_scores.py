"""The table of scores in a report."""

import json
from pathlib import Path

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.report.scores import Score, read_table, scalars_of, scores_of

RESULTS = {
    "results": {
        "quiz": {"alias": "quiz", "acc,none": 0.25, "acc_stderr,none": 0.05, "sample_len": 60},
        "sums": {"exact_match,strict": 1, "exact_match_stderr,strict": "N/A"},
    }
}


def test_numbers_of_the_harness() -> None:
    assert list(scores_of(RESULTS)) == [
        Score("quiz", "acc", 0.25, 0.05),
        Score("sums", "exact_match/strict", 1, None),
    ]
    assert scalars_of(RESULTS) == {
        "eval/quiz/acc": 0.25,
        "eval/quiz/acc_stderr": 0.05,
        "eval/sums/exact_match/strict": 1,
    }


def test_the_latest_steps(tmp_path: Path) -> None:
    assert read_table(tmp_path / "none") is None
    for step in range(1, 9):
        values = {"quiz": {"acc,none": step / 10}} if step != 8 else RESULTS["results"]
        (tmp_path / f"{step}.json").write_text(json.dumps({"results": values}))
    table = read_table(tmp_path)
    assert table is not None
    assert table.steps == (3, 4, 5, 6, 7, 8)
    assert table.rows[0][:2] == ("quiz", "acc")
    assert table.rows[0][2] == ("0.3000", "0.4000", "0.5000", "0.6000", "0.7000", "0.2500 ± 0.0500")
    assert table.rows[1] == ("sums", "exact_match/strict", ("", "", "", "", "", "1.0000"))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "5.json").write_text("{")
    with pytest.raises(UserError, match=r"5\.json holds no results"):
        read_table(tmp_path)
