"""Draw an optimizer study again, without training: ``python plot.py runs/optimizer_study``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from results import (
    FINAL,
    LABELS,
    SEARCH_SEED,
    Comparison,
    Recipe,
    Run,
    compare,
    find_best,
    mean_curve,
    of_phase,
    rank_search,
    read_run,
)

# Okabe and Ito's colors, which the common kinds of color blindness tell apart.
COLORS = {"muon": "#0072B2", "adam": "#D55E00"}
PICTURE = "optimizer_study.png"


def draw_study(runs: Sequence[Run], out: Path) -> Path:
    """Draw the loss over the steps at the best recipes, and the search.

    Args:
        runs: All runs of the study.
        out: Folder to write.

    Returns:
        The picture.
    """
    best = {name: of_phase(runs, FINAL, name) for name in LABELS}
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    curves, search = figure.subplots(1, 2, width_ratios=(3, 2))
    for axis in (curves, search):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e7eb", linewidth=0.6)
        axis.set_axisbelow(True)
    _draw_curves(curves, best)
    _draw_target(curves, compare(best["adam"], best["muon"], 1.0))
    _draw_search(search, runs)
    figure.savefig(out / PICTURE, dpi=150)
    return out / PICTURE


def _draw_curves(axis: Axes, best: dict[str, list[Run]]) -> None:
    """The mean over the seeds as a thick line, each seed as a thin one."""
    for name, chosen in best.items():
        for run in chosen:
            axis.plot(run.steps, run.losses, color=COLORS[name], linewidth=0.7, alpha=0.6)
        label = f"{LABELS[name]}, {chosen[0].recipe}"
        axis.plot(*mean_curve(chosen), color=COLORS[name], linewidth=2, label=label)
    # The first evaluation is so far above the others that it would flatten them.
    axis.set_ylim(top=max(run.losses[:2][-1] for chosen in best.values() for run in chosen) + 0.1)
    axis.set_xlabel("step")
    axis.set_ylabel("validation loss (nats per token)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
    axis.legend(frameon=False)


def _draw_target(axis: Axes, target: Comparison) -> None:
    """AdamW's final loss, and where Muon's mean reaches it."""
    axis.axhline(target.loss, color="#1f2430", linestyle=":", linewidth=1)
    if np.isnan(target.muon_steps):
        return
    axis.plot([target.muon_steps, target.adam_steps], [target.loss] * 2, "o", color="#1f2430")
    axis.annotate(
        f"{target.loss:.2f} after {target.muon_steps:.0f} and {target.adam_steps:.0f} steps",
        (target.muon_steps, target.loss),
        xytext=(-8, -8),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize="small",
    )


def _draw_search(axis: Axes, runs: Sequence[Run]) -> None:
    """Loss at the end of the search, recipe by recipe; the chosen one is filled."""
    rows: list[Run] = []
    for name in LABELS:
        best = find_best(runs, name).recipe
        for run in rank_search(runs, name):
            face = COLORS[name] if run.recipe == best else "white"
            axis.plot(run.losses[-1], len(rows), "o", color=COLORS[name], markerfacecolor=face)
            rows.append(run)
    axis.set_yticks(range(len(rows)), [str(run.recipe) for run in rows], fontsize="small")
    for label, run in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color(COLORS[run.optimizer])
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set_xlabel(f"validation loss at the end of the search, seed {SEARCH_SEED}")
    axis.set_title(
        "learning rates / warmup / beta1 / momentum", loc="left", fontsize="small", color="#1f2430"
    )


def main(out: Path) -> None:
    """Draw the study that ``results.json`` in the folder describes."""
    results = out / "results.json"
    if not results.is_file():
        sys.exit(f"plot.py: error: {results} is not there. Remedy: name the folder of a study.")
    content = json.loads(results.read_text())
    runs = [
        read_run(
            out,
            entry["phase"],
            entry["optimizer"],
            Recipe(**{name: entry[name] for name in Recipe._fields}),
            entry["seed"],
        )
        for entry in content["runs"]
    ]
    draw_study(runs, out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/optimizer_study"))
