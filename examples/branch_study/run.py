"""Anneal a branch of a run that stays at the plateau, and compare both at the same step.

    python examples/branch_study/run.py
    python examples/branch_study/run.py --seeds 5 --steps 800 --anneal-steps 160

For each seed a run at constant learning rates, and a branch of it (--branch-from) whose rates fall
to 0 over the last steps.  Both have read the same tokens at the end.  A run that is complete is not
trained again.  Any further flag goes to Megatron, for all runs alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

import study
from matplotlib.figure import Figure
from study import positive

from trinity_megatron.errors import UserError
from trinity_megatron.report.charts import BLUE, DPI, RED, axes_in_grid, finish
from trinity_megatron.telemetry.tensorboard_log import RunLog

VOCAB_SIZE, EVAL_ITERS, EVAL_INTERVAL = 2048, 16, 20
SEQ_LENGTH, BATCH_SIZE = 128, 16
# A narrow tiny, of which three seeds take minutes.
MODEL = (
    "--preset tiny --nproc 1 --hidden-size 128 --ffn-hidden-size 384 --kv-channels 16 "
    "--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 --window-size 31,0 "
    f"--seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} "
    f"--global-batch-size {BATCH_SIZE} --micro-batch-size {BATCH_SIZE} "
    "--lr-decay-style WSD --lr-wsd-decay-iters 1 --lr-warmup-fraction 0.1 "
    f"--eval-interval {EVAL_INTERVAL} --eval-iters {EVAL_ITERS} --log-interval 10 "
    "--tensorboard-log-interval 1"
)


@dataclass(frozen=True)
class Job(study.Job):
    """A run to train.

    Attributes:
        name: ``plateau`` or ``branch``.
        seed: Of the initial weights and the order of the data.
    """

    name: str
    seed: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    args, megatron_flags = build_parser().parse_known_args(argv)
    return study.run_study("branch study", args.out, lambda: compare(args, megatron_flags))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the study's own flags."""
    parser = argparse.ArgumentParser(
        description="Compare annealed branches with their run. Further flags go to Megatron.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/branch_study"), metavar="DIR")
    add("--data", type=Path, metavar="DIR", help="folder of prepare-data (default: make one)")
    add("--seeds", type=positive, default=3, metavar="N", help="(%(default)s)")
    add("--steps", type=positive, default=400, metavar="N", help="of a run (%(default)s)")
    add(
        "--anneal-steps",
        type=positive,
        default=100,
        metavar="N",
        help="last steps, which the branch anneals (%(default)s)",
    )
    study.add_jobs_flag(parser)
    return parser


def compare(args: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Train the runs, then their branches; write table and picture.

    Raises:
        UserError: The steps do not fit, or a run failed.
    """
    check_steps(args)
    data = args.data or study.prepare_text(args.out / "data", "--vocab-size", str(VOCAB_SIZE))
    common = [*MODEL.split(), "--train-iters", str(args.steps), "--data", str(data.resolve())]
    common += ["--save-interval", str(args.steps - args.anneal_steps), *megatron_flags]
    seeds = range(1, args.seeds + 1)
    jobs = [_job(args.out, "plateau", seed, common) for seed in seeds]
    _train(jobs, args)
    tokens = args.anneal_steps * SEQ_LENGTH * BATCH_SIZE
    branches = []
    for job in jobs:
        flags = ["--branch-from", str(job.folder), "--anneal-tokens", str(tokens)]
        flags += ["--branch-step", str(args.steps - args.anneal_steps)]
        branches.append(_job(args.out, "branch", job.seed, [*common, *flags]))
    _train(branches, args)
    print("\n" + report([*jobs, *branches], args))


def check_steps(args: argparse.Namespace) -> None:
    """Refuse steps between which there is nothing to compare.

    Raises:
        UserError: Names the flags and the remedy.
    """
    for flag, steps in (("--steps", args.steps), ("--anneal-steps", args.anneal_steps)):
        if steps % EVAL_INTERVAL:
            raise UserError(
                f"{flag} {steps} is no multiple of {EVAL_INTERVAL}, the steps between evaluations. "
                "Remedy: change it."
            )
    if args.anneal_steps >= args.steps:
        raise UserError(
            f"--anneal-steps {args.anneal_steps} is not below --steps {args.steps}. Remedy: fewer."
        )


def report(jobs: Sequence[Job], args: argparse.Namespace) -> str:
    """Write the results and the picture; returns the table, the verdict and where they are."""
    curves = {(job.name, job.seed): read_curve(job.folder) for job in jobs}
    first = args.steps - args.anneal_steps
    rows = [
        (
            seed,
            curves["plateau", seed][first],
            curves["plateau", seed][args.steps],
            curves["branch", seed][args.steps],
        )
        for seed in range(1, args.seeds + 1)
    ]
    picture = args.out / "branches.png"
    draw(curves, first).savefig(picture, dpi=DPI)
    results = args.out / "results.json"
    content = {"settings": study.settings_of(args), "validation_loss": rows}
    results.write_text(json.dumps(content, indent=1) + "\n")
    headings = ("seed", f"step {first}", f"step {args.steps}, at the plateau", "the same, annealed")
    lines = [
        f"| {' | '.join(headings)} |",
        "|---|---|---|---|",
        *(f"| {seed} | " + " | ".join(f"{x:.3f}" for x in losses) + " |" for seed, *losses in rows),
        "",
        verdict(rows),
        "",
        *map(str, (results, picture)),
    ]
    return "\n".join(lines)


def verdict(rows: Sequence[tuple[int, float, float, float]]) -> str:
    """Whether the annealed branches are better than their runs at the same step, in words.

    Args:
        rows: Seed, and validation loss where the branch begins, of the run at its end, and of the
            branch at its end, in nats per token.
    """
    gains = [plateau - annealed for _, _, plateau, annealed in rows]
    better = sum(gain > 0 for gain in gains)
    return (
        f"The annealed branch is better than its run at the same step for {better} of {len(rows)} "
        f"seeds: by {min(gains):.3f} to {max(gains):.3f} nats per token."
    )


def read_curve(folder: Path) -> dict[int, float]:
    """Validation loss of a run by step."""
    return RunLog(folder / "tensorboard").scalars("lm loss validation")


def draw(curves: dict[tuple[str, int], dict[int, float]], first: int) -> Figure:
    """Validation loss of the runs and, from where they begin, of their branches."""
    figure, (axis,) = axes_in_grid(1, 1, height=3.8)
    colors, labels = {"plateau": BLUE, "branch": RED}, {"plateau": "run", "branch": "branch"}
    for (name, seed), curve in curves.items():
        parent = curves["plateau", seed]
        shown = {step: loss for step, loss in curve.items() if name == "plateau" or step > first}
        if name == "branch":
            shown = {first: parent[first], **shown}
        label = labels[name] if seed == 1 else None
        axis.plot(list(shown), list(shown.values()), color=colors[name], label=label, linewidth=1.3)
    late = [loss for curve in curves.values() for step, loss in curve.items() if step >= first / 2]
    axis.set_ylim(min(late) - 0.05, max(late) + 0.05)
    axis.set_xlim(left=first / 2)
    axis.set_xlabel("step")
    axis.set_ylabel("validation loss (nats per token)")
    axis.legend(frameon=False)
    return finish(figure)


def _job(out: Path, name: str, seed: int, flags: Sequence[str]) -> Job:
    folder = (out / name / f"seed_{seed}").resolve()
    return Job(folder, (*flags, "--seed", str(seed), "--wandb-project", ""), name, seed)


def _train(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    study.train_all(
        jobs,
        num_at_once=args.jobs,
        command=[*study.CLI, "train"],
        environment=study.one_thread(),
        describe=lambda job: (
            f"{job.name}, seed {job.seed}: {list(read_curve(job.folder).values())[-1]:.3f}"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
