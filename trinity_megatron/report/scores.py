"""Scores of evaluations: the files that ``trinity-megatron evaluate`` writes, and their table.

A file holds what lm-evaluation-harness writes: ``results[task]["metric,filter"]`` and
``results[task]["metric_stderr,filter"]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import read_json

FOLDER_NAME = "evaluation"
_STDERR = "_stderr"
_NO_FILTER = "none"
_MOST_COLUMNS = 6


@dataclass(frozen=True)
class Score:
    """A number of an evaluation.

    Attributes:
        task: Name of the task or of a group of tasks.
        metric: Name of the metric; with a filter of the answers, ``metric/filter``.
        value: The score.
        stderr: Its standard error; None where the metric has none.
    """

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class ScoreTable:
    """Scores over the steps of a run.

    Attributes:
        steps: The latest ones that were evaluated, ascending.
        rows: Task, metric and a text for each step; empty where it was not evaluated.
    """

    steps: tuple[int, ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]


def scores_of(results: Mapping[str, Any]) -> Iterator[Score]:
    """The numbers in results of the harness.

    Args:
        results: As ``lm_eval`` returns or writes them.
    """
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith(_STDERR) or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}{_STDERR},{kind}")
            name = metric if kind == _NO_FILTER else f"{metric}/{kind}"
            yield Score(task, name, value, stderr if isinstance(stderr, int | float) else None)


def scalars_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers by the names that TensorBoard and W&B have: ``eval/TASK/METRIC``."""
    named: dict[str, float] = {}
    for score in scores_of(results):
        name = f"eval/{score.task}/{score.metric}"
        named[name] = score.value
        if score.stderr is not None:
            named[f"{name}{_STDERR}"] = score.stderr
    return named


def read_table(folder: Path) -> ScoreTable | None:
    """The scores of a run.

    Args:
        folder: With a file for each step, ``STEP.json``.

    Returns:
        None if nothing was evaluated.

    Raises:
        UserError: A file is damaged.
    """
    files = {int(path.stem): path for path in folder.glob("*.json") if path.stem.isdecimal()}
    steps = tuple(sorted(files)[-_MOST_COLUMNS:])
    found: dict[tuple[str, str], dict[int, str]] = {}
    for step in steps:
        for score in _read_scores(files[step]):
            found.setdefault((score.task, score.metric), {})[step] = _format(score)
    rows = [(*names, tuple(by.get(s, "") for s in steps)) for names, by in found.items()]
    return ScoreTable(steps, tuple(rows)) if rows else None


def _read_scores(path: Path) -> list[Score]:
    try:
        return list(scores_of(read_json(path)))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} holds no results of an evaluation ({error}). Remedy: remove it, and evaluate "
            "again."
        ) from error


def _format(score: Score) -> str:
    error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    return f"{score.value:.4f}{error}"
