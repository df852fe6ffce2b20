"""Draw a needle study again, without training: ``python plot.py runs/needle_study``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import (
    ARMS,
    GOAL,
    GROUPS,
    LONG_LENGTH,
    MAX_LOSS,
    SHORT_LENGTH,
    Run,
    describe_group,
    load_results,
)

from trinity_megatron.errors import UserError
from trinity_megatron.evaluation.niah import NUM_KEYS

# Okabe and Ito's colours, which the common kinds of colour blindness tell apart.
COLORS = {"short": "#D55E00", "continued": "#E69F00", "extended": "#0072B2"}
PICTURE = "needle_study.png"


def draw_study(runs: Sequence[Run], out: Path) -> Path:
    """Draw retrieval by distance and the loss on short text, a bar or point for each run.

    Args:
        runs: All runs of the study.
        out: Folder to write.

    Returns:
        The picture.
    """
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.4, 1))
    _draw_retrieval(left, runs)
    _draw_losses(right, runs)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e7eb", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.savefig(out / PICTURE, dpi=150)
    return out / PICTURE


def _draw_retrieval(axis: Axes, runs: Sequence[Run]) -> None:
    arms = _present(runs)
    width = 0.8 / len(arms)
    places = np.arange(len(GROUPS))
    for number, arm in enumerate(arms):
        own = [run for run in runs if run.arm == arm]
        left = places + (number - (len(arms) - 1) / 2) * width
        means = [np.mean([run.rate(group) for run in own]) for group in GROUPS]
        axis.bar(left, means, 0.92 * width, color=COLORS[arm], label=_label(arm))
        for run in own if len(own) > 1 else ():
            axis.plot(left, [run.rate(group) for group in GROUPS], ".", color="black", ms=4)
    axis.axhline(GOAL, color="#374151", linewidth=0.8, linestyle="--")
    # What a model reaches that gives any of the numbers it has read.
    axis.axhline(1 / NUM_KEYS, color="#374151", linewidth=0.8, linestyle=":")
    axis.axvline(GROUPS.index(SHORT_LENGTH) + 0.5, color="#9ca3af", linewidth=0.8)
    axis.set_xticks(places, [describe_group(group) for group in GROUPS])
    axis.set_xlabel("tokens from the needle to the answer")
    axis.set_ylabel("right answers")
    axis.set_ylim(0, 1.02)
    axis.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)


def _draw_losses(axis: Axes, runs: Sequence[Run]) -> None:
    arms = _present(runs)
    base = {run.seed: run.loss for run in runs if run.arm == "short"}
    for number, arm in enumerate(arms):
        differences = [run.loss - base[run.seed] for run in runs if run.arm == arm]
        axis.plot([number] * len(differences), differences, "o", color=COLORS[arm])
    axis.axhline(MAX_LOSS, color="#374151", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(arms)), [ARMS[arm].short_label for arm in arms])
    axis.set_xlim(-0.5, len(arms) - 0.5)
    axis.set_ylabel("loss on short text, minus before (nats)")


def _label(arm: str) -> str:
    return f"{ARMS[arm].label} ({LONG_LENGTH if ARMS[arm].is_long else SHORT_LENGTH})"


def _present(runs: Sequence[Run]) -> list[str]:
    return [arm for arm in ARMS if any(run.arm == arm for run in runs)]


def main(out: Path) -> None:
    """Draw the study that ``results.json`` in the folder describes."""
    try:
        draw_study(load_results(out), out)
    except UserError as error:
        sys.exit(f"plot.py: error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/needle_study"))
