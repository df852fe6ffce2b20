"""Draw a buffer study again, without training: ``python plot.py runs/buffer_study``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from results import ARMS, Run, num_skipped, read_run

# Okabe and Ito's colours, which the common kinds of colour blindness tell apart.
COLORS = {
    "sequential": "#D55E00",
    "sequential_long": "#E69F00",
    "shuffled": "#009E73",
    "rsdb": "#0072B2",
}
PICTURE = "buffer_study.png"
_PANELS: tuple[tuple[str, Callable[[Run], np.ndarray]], ...] = (
    ("training loss (nats per token)", lambda run: run.loss),
    ("BatchHet (nats per token)", lambda run: run.batch_het),
    ("gradient norm", lambda run: run.gradient_norm),
)


def draw_study(runs: Sequence[Run], out: Path) -> Path:
    """Draw loss, BatchHet and gradient norm of each step of the first seed, arm by arm.

    Single steps, not means: how much they jump is what the orders differ in.

    Args:
        runs: All runs of the study.
        out: Folder to write.

    Returns:
        The picture.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    first = [next(run for run in runs if run.arm == arm) for arm in arms]
    figure = Figure(figsize=(2.9 * len(arms), 7.0), layout="constrained")
    axes = figure.subplots(len(_PANELS), len(arms), squeeze=False, sharex=True, sharey="row")
    for row, (label, values) in zip(axes, _PANELS, strict=True):
        row[0].set_ylabel(label)
        for axis, run in zip(row, first, strict=True):
            _draw(axis, run, values(run))
        skipped = num_skipped(len(first[0].steps))
        shown = np.concatenate([values(run)[skipped // 2 :] for run in first])
        row[0].set_ylim(0, 1.05 * shown.max())
    for axis, run in zip(axes[0], first, strict=True):
        axis.set_title(ARMS[run.arm].label, fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.savefig(out / PICTURE, dpi=150)
    return out / PICTURE


def _draw(axis: Axes, run: Run, values: np.ndarray) -> None:
    axis.plot(run.steps, values, color=COLORS[run.arm], linewidth=0.9)
    axis.axvspan(0, run.steps[num_skipped(len(run.steps))], color="#f3f4f6", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=4))


def main(out: Path) -> None:
    """Draw the study that ``results.json`` in the folder describes."""
    results = out / "results.json"
    if not results.is_file():
        sys.exit(f"plot.py: error: {results} is not there. Remedy: name the folder of a study.")
    content = json.loads(results.read_text())
    runs = [
        read_run(out, arm, seed)
        for arm, values in content["arms"].items()
        for seed in values["seeds"]
    ]
    draw_study(runs, out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/buffer_study"))
