"""What an optimizer study measured: validation losses, the search, and the steps to a loss."""

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

LABELS = {"muon": "Muon", "adam": "AdamW"}
# Recipes are searched on this seed: all in runs that may be shorter than the final ones, then the
# best of those (the shortlist) in runs as long as these.
SEARCH_SEED = 1
SEARCH, SHORTLIST, FINAL = "search", "shortlist", "final"
# Muon should need at most this part of AdamW's steps to AdamW's final loss.
LIMIT = 0.7
# The targets: mean validation loss of AdamW after these parts of its steps.  The last one decides.
SHARES = (0.5, 0.75, 1.0)


class Recipe(NamedTuple):
    """What is searched.

    Attributes:
        lr: Learning rate of the hidden layers.
        decoupled_lr: Of the embedding and the head, and under Muon of all else that AdamW updates.
        warmup: Steps of warmup.
        beta1: Of AdamW, be it of all parameters or of those that Muon leaves to it.
        momentum: Of Muon; None for AdamW.
    """

    lr: float
    decoupled_lr: float
    warmup: int
    beta1: float
    momentum: float | None = None

    def __str__(self) -> str:
        return " / ".join(f"{value:g}" for value in self if value is not None)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        phase: :data:`SEARCH`, :data:`SHORTLIST` or :data:`FINAL`.
        optimizer: A key of :data:`LABELS`.
        recipe: Its settings.
        seed: Of the initial weights and of the order of the data.
        steps: Steps after which it was evaluated, ``[num_evaluations]``.
        losses: Validation losses in nats per token, ``[num_evaluations]``.
    """

    phase: str
    optimizer: str
    recipe: Recipe
    seed: int
    steps: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Steps to one validation loss.

    Attributes:
        share: Part of AdamW's steps after which its mean loss is the target.
        loss: The target, nats per token.
        adam_steps: Steps after which AdamW's mean loss first reaches it.
        muon_steps: The same for Muon's mean loss; NaN if it never does.
        seed_steps: The same for each seed of Muon.
    """

    share: float
    loss: float
    adam_steps: float
    muon_steps: float
    seed_steps: dict[int, float]

    @property
    def seed_ratios(self) -> dict[int, float]:
        """Steps of each seed of Muon as a part of AdamW's."""
        return {seed: steps / self.adam_steps for seed, steps in self.seed_steps.items()}


def run_folder(out: Path, phase: str, optimizer: str, recipe: Recipe, seed: int) -> Path:
    """Where a run of the study lies."""
    name = f"lr_{recipe.lr:g}_{recipe.decoupled_lr:g}_warmup_{recipe.warmup}_{recipe.beta1:g}"
    if recipe.momentum is not None:
        name += f"_momentum_{recipe.momentum:g}"
    return out / phase / optimizer / name / f"seed_{seed}"


def read_run(out: Path, phase: str, optimizer: str, recipe: Recipe, seed: int) -> Run:
    """Read a complete run from its log.

    Raises:
        FileNotFoundError: There is no log.
        UserError: It has no validation loss.
    """
    folder = run_folder(out, phase, optimizer, recipe, seed)
    losses = RunLog(folder / "tensorboard").scalars("lm loss validation")
    if not losses:
        raise UserError(
            f"{folder} has no validation loss. Remedy: remove it and start the study again."
        )
    steps, values = np.array(list(losses)), np.array(list(losses.values()))
    return Run(phase, optimizer, recipe, seed, steps, values)


def steps_to_reach(steps: np.ndarray, losses: np.ndarray, target: float) -> float:
    """Steps after which a loss is first at or below a target.

    Between two evaluations the loss is taken as a straight line.  What is reached at the first
    evaluation already counts as reached there, for nothing is known before it.

    Args:
        steps: Rising, ``[num_evaluations]``.
        losses: ``[num_evaluations]``; need not fall steadily.
        target: The loss to reach.

    Returns:
        Steps, or NaN if the target is not reached.
    """
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return math.nan
    last = reached[0]
    if last == 0:
        return float(steps[0])
    before, after = losses[last - 1], losses[last]
    part = (before - target) / (before - after)
    return float(steps[last - 1] + part * (steps[last] - steps[last - 1]))


def compare(adam: Sequence[Run], muon: Sequence[Run], share: float) -> Comparison:
    """Compare steps to the mean loss that AdamW has after a part of its steps.

    Args:
        adam: Seeds of AdamW at its best recipe.
        muon: Seeds of Muon at its own.
        share: The part; the last evaluation up to there counts.
    """
    steps, losses = mean_curve(adam)
    target = losses[np.flatnonzero(steps <= share * steps[-1])[-1]]
    return Comparison(
        share,
        float(target),
        steps_to_reach(steps, losses, target),
        steps_to_reach(*mean_curve(muon), target),
        {run.seed: steps_to_reach(run.steps, run.losses, target) for run in muon},
    )


def mean_curve(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and mean losses of runs that were evaluated after the same steps."""
    return runs[0].steps, np.mean([run.losses for run in runs], axis=0)


def find_shortlist(runs: Sequence[Run], optimizer: str, size: int) -> list[Run]:
    """The runs of the search with the lowest final validation losses, best first.

    Raises:
        UserError: The best one's learning rate is at the edge of those searched.
    """
    ranked = rank_search(runs, optimizer)
    _refuse_edge(ranked[0], runs)
    return ranked[:size]


def rank_search(runs: Sequence[Run], optimizer: str) -> list[Run]:
    """The runs of an optimizer's search, best first."""
    return sorted(of_phase(runs, SEARCH, optimizer), key=_last_loss)


def find_best(runs: Sequence[Run], optimizer: str) -> Run:
    """The run of the shortlist with the lowest final validation loss.

    Raises:
        UserError: Its learning rate is at the edge of those searched, or there is no shortlist.
    """
    listed = of_phase(runs, SHORTLIST, optimizer)
    if not listed:
        raise UserError(
            f"the study has no shortlist of {LABELS[optimizer]}. Remedy: start it again with "
            "run.py in the same folder; what is trained is kept."
        )
    best = min(listed, key=_last_loss)
    _refuse_edge(best, runs)
    return best


def of_phase(runs: Sequence[Run], phase: str, optimizer: str) -> list[Run]:
    """The runs of an optimizer in a phase, by recipe and seed."""
    mine = [run for run in runs if (run.phase, run.optimizer) == (phase, optimizer)]
    return sorted(mine, key=lambda run: (run.recipe, run.seed))


def write_results(runs: Sequence[Run], out: Path, *, settings: Mapping[str, object]) -> str:
    """Write ``results.json`` and ``results.md``.

    Args:
        runs: All runs of the study.
        out: Folder.
        settings: What the study was started with.

    Returns:
        The content of ``results.md``.
    """
    best = {name: find_best(runs, name).recipe for name in LABELS}
    adam, muon = (of_phase(runs, FINAL, name) for name in ("adam", "muon"))
    comparisons = [compare(adam, muon, share) for share in SHARES]
    content = {
        "settings": dict(settings),
        "best": {name: recipe._asdict() for name, recipe in best.items()},
        "runs": [
            {
                "phase": run.phase,
                "optimizer": run.optimizer,
                **run.recipe._asdict(),
                "seed": run.seed,
                "steps": run.steps.tolist(),
                "validation_loss": run.losses.tolist(),
            }
            for run in runs
        ],
        "comparisons": [_content(comparison) for comparison in comparisons],
        "statement": statement(comparisons[-1]),
    }
    (out / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    lines = [*_search_table(runs, best), "", *_final_table(adam, muon), ""]
    lines += [*_comparison_table(comparisons), "", statement(comparisons[-1])]
    text = "\n".join(lines)
    (out / "results.md").write_text(text + "\n")
    return text


def statement(comparison: Comparison) -> str:
    """Say in words whether Muon needs at most :data:`LIMIT` of AdamW's steps, in every seed."""
    ratios = comparison.seed_ratios.values()
    start = (
        f"Validation loss {comparison.loss:.3f}, AdamW's after {comparison.adam_steps:.0f} steps"
    )
    if any(math.isnan(ratio) for ratio in ratios):
        return f"{start}: not every seed of Muon reaches it."
    mean, verdict = float(np.mean(list(ratios))), "does not hold"
    if mean <= LIMIT:
        verdict = "holds" if max(ratios) <= LIMIT else "holds on average, not in every seed"
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"{start}: Muon needs {mean:.2f} of them ({each}); at most {LIMIT} {verdict}."


def _last_loss(run: Run) -> float:
    return float(run.losses[-1])


def _refuse_edge(best: Run, runs: Sequence[Run]) -> None:
    """Refuse a best learning rate beyond which a better one may lie."""
    lrs = sorted({run.recipe.lr for run in of_phase(runs, SEARCH, best.optimizer)})
    if len(lrs) > 1 and best.recipe.lr in (lrs[0], lrs[-1]):
        raise UserError(
            f"{LABELS[best.optimizer]}'s best learning rate, {best.recipe.lr:g}, is at the edge of "
            f"those searched, {lrs[0]:g} to {lrs[-1]:g}. Remedy: add a recipe beyond it to "
            f"--{best.optimizer}-recipes, and one to the other optimizer's; what is trained is "
            "kept."
        )


def _content(comparison: Comparison) -> dict[str, object]:
    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "share": comparison.share,
        "loss": comparison.loss,
        "adam_steps": known(comparison.adam_steps),
        "muon_steps": known(comparison.muon_steps),
        "seed_steps": {seed: known(steps) for seed, steps in comparison.seed_steps.items()},
        "seed_ratios": {seed: known(ratio) for seed, ratio in comparison.seed_ratios.items()},
    }


def _search_table(runs: Sequence[Run], best: Mapping[str, Recipe]) -> list[str]:
    """Lines of a markdown table: validation loss at the end of every run before the final ones."""
    lines = [
        "| optimizer, steps | learning rate of hidden layers / of embedding and head / warmup / "
        "beta1 / Muon's momentum: validation loss, one seed |",
        "|---|---|",
    ]
    for phase in (SEARCH, SHORTLIST):
        for name, label in LABELS.items():
            cells = []
            for run in of_phase(runs, phase, name):
                cell = f"{run.recipe}: {run.losses[-1]:.3f}"
                cells.append(f"**{cell}**" if run.recipe == best[name] else cell)
            lines.append(f"| {label}, {run.steps[-1]} | {' &nbsp; '.join(cells)} |")
    return lines


def _final_table(adam: Sequence[Run], muon: Sequence[Run]) -> list[str]:
    lines = ["| optimizer | recipe | final validation loss, mean | each seed |"]
    lines.append("|---|---|---|---|")
    for runs in (muon, adam):
        final = [run.losses[-1] for run in runs]
        each = ", ".join(f"{loss:.3f}" for loss in final)
        name = LABELS[runs[0].optimizer]
        lines.append(f"| {name} | {runs[0].recipe} | {np.mean(final):.3f} | {each} |")
    return lines


def _comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    lines = [
        "| target: AdamW's mean loss at | loss | AdamW's steps | Muon's steps, each seed "
        "| ratio, each seed | mean ratio |",
        "|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        ratios = list(one.seed_ratios.values())
        mean = float(np.mean(ratios))
        lines.append(
            f"| {one.share:.0%} of its steps | {one.loss:.3f} | {one.adam_steps:.0f} "
            f"| {_listed(one.seed_steps.values(), '.0f')} | {_listed(ratios, '.2f')} "
            f"| {_listed([mean], '.2f')} |"
        )
    return lines


def _listed(values: Sequence[float], form: str) -> str:
    return ", ".join("not reached" if math.isnan(v) else format(v, form) for v in values)
