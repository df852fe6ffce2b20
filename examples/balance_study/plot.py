"""Draw a balance study again, without training: ``python plot.py runs/balance_study``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from results import LABELS, Run, num_steady, read_run

# Okabe and Ito's colours, which the common kinds of colour blindness tell apart.
COLORS = {
    "none": "#6b7280",
    "sign": "#D55E00",
    "smebu": "#0072B2",
    "sign_momentum": "#E69F00",
    "linear": "#009E73",
}
PICTURES = ("balance_maxvio.png", "balance_loss.png")
# Steps over which a curve is averaged: about a twentieth of the run, so that rules can be told
# apart under the noise of single steps.
_SMOOTHING_SHARE = 0.05


def draw_study(runs: Sequence[Run], out: Path, *, noise_floor: float) -> list[Path]:
    """Draw MaxVio and training loss of all rules over the steps.

    Args:
        runs: All runs of the study.
        out: Folder to write.
        noise_floor: MaxVio of a step by chance alone, drawn as a line.

    Returns:
        The pictures.
    """
    violation, loss = (out / name for name in PICTURES)
    figure, (axis,) = _figure(runs, "MaxVio, mean over the MoE layers")
    _draw_rules(axis, runs, lambda run: run.violation)
    axis.axhline(noise_floor, color="#1f2430", linestyle=":", linewidth=1, label="chance alone")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    _save(figure, violation)
    reference = {run.seed: run.loss for run in runs if run.rule == _reference_rule(runs)}
    minus = f"loss minus that of {LABELS[_reference_rule(runs)]}, same seed"
    figure, (left, right) = _figure(runs, "training loss (nats per token)", minus)
    _draw_rules(left, runs, lambda run: run.loss)
    _draw_rules(right, runs, lambda run: run.loss - reference[run.seed])
    _save(figure, loss)
    return [violation, loss]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last ``width`` values, fewer at the start, ``[n] -> [n]``."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)


def _draw_rules(axis: Axes, runs: Sequence[Run], values: Callable[[Run], np.ndarray]) -> None:
    """For each rule the mean over the seeds as a line and their range as a band."""
    for rule in dict.fromkeys(run.rule for run in runs):
        mine = [run for run in runs if run.rule == rule]
        width = max(1, round(_SMOOTHING_SHARE * len(mine[0].steps)))
        curves = np.stack([smooth(values(run), width) for run in mine])
        color, steps = COLORS[rule], mine[0].steps
        low, high = curves.min(axis=0), curves.max(axis=0)
        axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.plot(steps, curves.mean(axis=0), color=color, linewidth=1.5, label=LABELS[rule])


def _reference_rule(runs: Sequence[Run]) -> str:
    rules = [run.rule for run in runs]
    return "smebu" if "smebu" in rules else rules[0]


def _figure(runs: Sequence[Run], *labels: str) -> tuple[Figure, list[Axes]]:
    """A panel for each label over the steps, the last quarter in grey."""
    figure = Figure(figsize=(10.5, 5.0), layout="constrained")
    axes = list(figure.subplots(1, len(labels), squeeze=False).ravel())
    steps = runs[0].steps
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e7eb", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.axvspan(steps[-num_steady(len(steps))], steps[-1], color="#f3f4f6", zorder=0)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def main(out: Path) -> None:
    """Draw the study that ``results.json`` in the folder describes."""
    results = out / "results.json"
    if not results.is_file():
        sys.exit(f"plot.py: error: {results} is not there. Remedy: name the folder of a study.")
    content = json.loads(results.read_text())
    runs = [
        read_run(out, rule, seed)
        for rule, values in content["rules"].items()
        for seed in values["seeds"]
    ]
    draw_study(runs, out, noise_floor=content["noise_floor"]["steady_violation"])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/balance_study"))
