"""Results of evaluations: where they go, and what stays."""

import json
from pathlib import Path

import pytest

from trinity_megatron.evaluation.results import find_run, write_results


def results(**tasks: float) -> str:
    return json.dumps(
        {
            "results": {name: {"acc,none": value} for name, value in tasks.items()},
            "n-shot": dict.fromkeys(tasks, 0),
            "config": {"batch_size": len(tasks)},
            "date": 1.0,
        }
    )


def test_other_tasks_of_the_step_stay(tmp_path: Path) -> None:
    write_results(tmp_path, 20, results(a=0.1, b=0.2))
    path = write_results(tmp_path, 20, results(b=0.3))
    assert path == tmp_path / "evaluation" / "20.json"
    found = json.loads(path.read_text())
    assert found["results"] == {"a": {"acc,none": 0.1}, "b": {"acc,none": 0.3}}
    assert found["n-shot"] == {"a": 0, "b": 0}
    assert found["config"] == {"batch_size": 1}


@pytest.mark.parametrize(
    ("load", "run"),
    [
        ("run/checkpoints", "run"),
        ("run/checkpoints/iter_0000010", "run"),
        ("saved", "saved"),
        ("saved/release", "saved"),
    ],
)
def test_the_run_of_a_checkpoint(load: str, run: str, tmp_path: Path) -> None:
    folder = tmp_path / load
    folder.mkdir(parents=True)
    if folder.name in ("iter_0000010", "release"):
        (folder / ".metadata").touch()
    assert find_run(None, folder) == tmp_path / run
    assert find_run(tmp_path / "other", folder) == tmp_path / "other"
