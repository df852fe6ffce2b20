"""What a buffer study measured: read from the logs of its runs, condensed into a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trinity_megatron.errors import UserError
from trinity_megatron.telemetry.tensorboard_log import RunLog


class Arm(NamedTuple):
    """A way to read the documents.

    Attributes:
        label: In tables and pictures.
        order: Of the mixture's file.
        has_long_clusters: Whether a cluster of the file is longer than a batch.
    """

    label: str
    order: str
    has_long_clusters: bool = False


ARMS = {
    "sequential": Arm("sequential, short clusters", "sequential"),
    "sequential_long": Arm("sequential, long clusters", "sequential", True),
    "shuffled": Arm("shuffled", "shuffled"),
    "rsdb": Arm("RSDB", "rsdb"),
}
# The numbers of a run: heading and format in the table.
COLUMNS = {
    "batch_het": ("BatchHet", ".3f"),
    "loss_variance": ("step-to-step loss variance", ".4f"),
    "gradient_kurtosis": ("kurtosis of the gradient norm", ".1f"),
    "validation_loss": ("validation loss", ".3f"),
}
# What the report says of RSDB against sequential packing (3.2): BatchHet and the kurtosis as parts
# of the baseline's.  It gives neither the model nor the text.
REPORTED_BATCH_HET = -0.46
REPORTED_KURTOSIS = (187.0, 14.6)
# Steps at the start that count in no number: the loss falls too fast there to judge its jumps.
SKIPPED_SHARE = 0.25
# Validation losses closer than this, in nats per token, count as equal in any case.
EQUAL_LOSS = 0.02
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: A key of :data:`ARMS`.
        seed: Its seed.
        steps: Training steps, from 1, ``[num_steps]``.
        batch_het: BatchHet of each step in nats per token, ``[num_steps]``.
        loss: Training loss of each step in nats per token, ``[num_steps]``.
        gradient_norm: Of each step, before clipping, ``[num_steps]``.
        numbers: One value for each of :data:`COLUMNS`.
    """

    arm: str
    seed: int
    steps: np.ndarray
    batch_het: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    numbers: Mapping[str, float]


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a run of the study lies."""
    return out / arm / f"seed_{seed}"


def read_run(out: Path, arm: str, seed: int) -> Run:
    """Read a complete run from its log.

    Raises:
        FileNotFoundError: There is no log.
        UserError: It lacks a series or the validation loss.
    """
    folder = run_folder(out, arm, seed)
    log = RunLog(folder / "tensorboard")
    series = {name: log.scalars(name) for name in ("data/batch_het", "lm loss", "grad-norm")}
    validation = log.scalars("lm loss validation")
    steps = list(series["lm loss"])
    if not validation or not steps or any(list(values) != steps for values in series.values()):
        raise UserError(
            f"{folder} lacks a loss, a BatchHet or a gradient norm of a step, or the validation "
            "loss. Remedy: remove it and start the study again."
        )
    batch_het, loss, norm = (np.array(list(values.values())) for values in series.values())
    first = num_skipped(len(steps))
    numbers = {
        "batch_het": float(batch_het[first:].mean()),
        "loss_variance": step_variance(loss[first:]),
        "gradient_kurtosis": kurtosis(norm[first:]),
        "validation_loss": float(list(validation.values())[-1]),
    }
    return Run(arm, seed, np.array(steps), batch_het, loss, norm, numbers)


def num_skipped(num_steps: int) -> int:
    """Steps at the start that count in no number."""
    return round(SKIPPED_SHARE * num_steps)


def step_variance(losses: np.ndarray) -> float:
    """Variance of a step's loss around its trend, ``[n] -> ()``.

    Half of the mean squared difference of neighbours: the variance, if steps are independent, and
    a loss that falls slowly adds nothing to it.

    Source: von Neumann, Distribution of the ratio of the mean square successive difference to the
    variance (1941).
    """
    return float(np.square(np.diff(losses)).mean() / 2)


def kurtosis(values: np.ndarray) -> float:
    """Fourth standardised moment, ``[n] -> ()``: 3 of a normal distribution, more with outliers."""
    centred = values - values.mean()
    return float((centred**4).mean() / np.square(np.square(centred).mean()))


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN for that of a single value."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), spread


def statements(runs: Sequence[Run]) -> list[str]:
    """Compare RSDB with each other arm, number by number, in words."""
    present = dict.fromkeys(run.arm for run in runs)
    if "rsdb" not in present:
        return []
    return [compare(runs, arm, name) for arm in present if arm != "rsdb" for name in COLUMNS]


def compare(runs: Sequence[Run], other: str, name: str) -> str:
    """Say how a number of RSDB differs from that of another arm.

    Runs of the same seed have the same initial weights and are compared with each other.  A
    difference below two standard errors of the paired differences is called undecided, and one of
    the validation loss below :data:`EQUAL_LOSS` no difference.
    """
    values = {arm: _by_seed(runs, arm, name) for arm in ("rsdb", other)}
    seeds = sorted(values["rsdb"].keys() & values[other].keys())
    heading, form = COLUMNS[name]
    start = f"{heading}, RSDB against {ARMS[other].label}"
    if not seeds:
        return f"{start}: no seed in common."
    mine, others = ([values[arm][seed] for seed in seeds] for arm in ("rsdb", other))
    change = _describe_change(name, float(np.mean(mine)), float(np.mean(others)))
    verdict = judge(name, np.subtract(mine, others))
    reported = _against_report(name, verdict, mine, others) if other.startswith("seq") else ""
    return (
        f"{start}: {_with_error(mine, form)} against {_with_error(others, form)}, {change}, lower "
        f"in {int(np.sum(np.less(mine, others)))} of {len(seeds)} seeds: {verdict}.{reported}"
    )


def judge(name: str, differences: np.ndarray) -> str:
    """``lower``, ``higher``, ``equal`` or ``undecided``, from the differences of each seed.

    Args:
        name: Key of :data:`COLUMNS`.
        differences: RSDB minus the other arm, ``[seeds]``.
    """
    mean, spread = mean_and_std(differences.tolist())
    if name == "validation_loss" and abs(mean) < EQUAL_LOSS:
        return "equal"
    if len(differences) < 2:
        return ("lower" if mean < 0 else "higher") + " in this one seed"
    if abs(mean) < _STANDARD_ERRORS * spread / math.sqrt(len(differences)):
        return "undecided, the difference is within the noise of the seeds"
    return "lower" if mean < 0 else "higher"


def _against_report(name: str, verdict: str, mine: Sequence[float], others: Sequence[float]) -> str:
    """What the numbers say of the report's, which are of sequential packing."""
    change = float(np.mean(mine) / np.mean(others) - 1)
    if name == "batch_het":
        claim = f"its {REPORTED_BATCH_HET:.0%}"
        size = change <= REPORTED_BATCH_HET
    elif name == "gradient_kurtosis":
        before, after = REPORTED_KURTOSIS
        claim = f"its {before:g} to {after:g}"
        size = change <= after / before - 1
    else:
        return ""
    if verdict.startswith("undecided"):
        return f" So is the report's direction here, and {claim} is not reached."
    if not verdict.startswith("lower"):
        return f" The report's direction does not hold here, nor does {claim}."
    return f" The report's direction holds; {claim} {'is reached' if size else 'is not reached'}."


def _describe_change(name: str, mine: float, other: float) -> str:
    if name == "validation_loss":
        return f"{mine - other:+.3f} nats"
    return f"{mine / other - 1:+.0%}"


def _by_seed(runs: Sequence[Run], arm: str, name: str) -> dict[int, float]:
    return {run.seed: run.numbers[name] for run in runs if run.arm == arm}


def write_results(runs: Sequence[Run], out: Path, *, settings: Mapping[str, object]) -> str:
    """Write ``results.json`` and ``results.md``.

    Args:
        runs: All runs of the study.
        out: Folder.
        settings: What the study was started with.

    Returns:
        The content of ``results.md``.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    lines = statements(runs)
    content = {
        "settings": dict(settings),
        "statements": lines,
        "arms": {arm: _arm_content([run for run in runs if run.arm == arm]) for arm in arms},
    }
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join([*_table(runs, arms), "", *(f"- {line}" for line in lines)])
    (out / "results.md").write_text(text + "\n")
    return text


def _arm_content(runs: Sequence[Run]) -> dict[str, object]:
    content: dict[str, object] = {"seeds": [run.seed for run in runs]}
    for name in COLUMNS:
        values = [run.numbers[name] for run in runs]
        mean, spread = mean_and_std(values)
        content[name] = {
            "mean": mean,
            "std": None if math.isnan(spread) else spread,
            "values": values,
        }
    return content


def _table(runs: Sequence[Run], arms: Sequence[str]) -> list[str]:
    """Lines of a markdown table: a row for each arm."""
    lines = [
        "| order | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for arm in arms:
        cells = [
            _with_error([run.numbers[name] for run in runs if run.arm == arm], form)
            for name, (_, form) in COLUMNS.items()
        ]
        lines.append(f"| {ARMS[arm].label} | " + " | ".join(cells) + " |")
    return lines


def _with_error(values: Sequence[float], form: str) -> str:
    mean, spread = mean_and_std(values)
    return f"{mean:{form}}" if math.isnan(spread) else f"{mean:{form}} +- {spread:{form}}"
