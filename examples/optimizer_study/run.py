"""Train the tiny preset with Muon and with AdamW, and compare the steps to the same loss.

    python examples/optimizer_study/run.py
    python examples/optimizer_study/run.py --seeds 5 --steps 400

First a search, as many recipes for one as for the other on one seed; the best of each
(``--shortlist``) are trained on it to the full length, and the best of these on all seeds.  A run
that is complete is not trained again.  Any further flag goes to Megatron, for all runs alike.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

import study
from plot import draw_study
from results import (
    FINAL,
    LABELS,
    SEARCH,
    SEARCH_SEED,
    SHORTLIST,
    Recipe,
    Run,
    find_best,
    find_shortlist,
    read_run,
    run_folder,
    write_results,
)
from study import positive

from trinity_megatron.errors import UserError
from trinity_megatron.launch.local import (
    build_environment,
    count_cuda_devices,
    single_rank_environment,
)

# Around where each is expected, as many for one as for the other.
MUON_RECIPES = (
    Recipe(0.04, 0.024, 5, 0.9, 0.85),
    Recipe(0.02, 0.024, 5, 0.9, 0.85),
    Recipe(0.08, 0.024, 5, 0.9, 0.85),
    Recipe(0.04, 0.048, 5, 0.9, 0.85),
    Recipe(0.04, 0.024, 10, 0.9, 0.85),
    Recipe(0.04, 0.024, 5, 0.9, 0.95),
    Recipe(0.04, 0.024, 5, 0.9, 0.7),
    Recipe(0.04, 0.024, 5, 0.9, 0.6),
    Recipe(0.04, 0.024, 5, 0.8, 0.7),
)
ADAM_RECIPES = (
    Recipe(0.006, 0.012, 10, 0.9),
    Recipe(0.003, 0.012, 10, 0.9),
    Recipe(0.006, 0.012, 5, 0.9),
    Recipe(0.006, 0.012, 20, 0.9),
    Recipe(0.006, 0.012, 10, 0.8),
    Recipe(0.003, 0.012, 10, 0.8),
    Recipe(0.0015, 0.012, 10, 0.8),
    Recipe(0.00075, 0.012, 10, 0.8),
    Recipe(0.003, 0.012, 20, 0.8),
)
MUON_FLAGS = "--muon-nesterov"
BATCH_SIZE, EVAL_ITERS = 64, 1
TRAIN = Path(__file__).with_name("train.py")


@dataclass(frozen=True)
class Job(study.Job):
    """A run to train.

    Attributes:
        phase: ``SEARCH``, ``SHORTLIST`` or ``FINAL``.
        optimizer: Key of ``LABELS``.
        recipe: Its settings.
        seed: Of the initial weights and of the order of the data.
    """

    phase: str
    optimizer: str
    recipe: Recipe
    seed: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    parser = build_parser()
    args, megatron_flags = parser.parse_known_args(argv)
    try:
        check_search(args)
    except UserError as error:
        parser.error(str(error))
    return study.run_study(
        "optimizer study", args.out, lambda: compare_optimizers(args, megatron_flags)
    )


def compare_optimizers(args: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Search, train all seeds at the best, and report.

    Raises:
        UserError: The best of the search is at an edge, or a run failed.
    """
    data = (args.data or study.prepare_text(args.out / "data")).resolve()
    jobs = partial(phase_jobs, args, [*common_flags(args, data), *megatron_flags])
    recipes = [
        (optimizer, recipe)
        for optimizer, given in (("muon", args.muon_recipes), ("adam", args.adam_recipes))
        for recipe in sorted(set(given))
    ]
    search = jobs(SEARCH, recipes, [SEARCH_SEED])
    runs = train_all(search, args)
    listed = [run for name in LABELS for run in find_shortlist(runs, name, args.shortlist)]
    shortlist = jobs(SHORTLIST, [(run.optimizer, run.recipe) for run in listed], [SEARCH_SEED])
    take_from(search, shortlist)
    runs += train_all(shortlist, args)
    best = [(name, find_best(runs, name).recipe) for name in LABELS]
    final = jobs(FINAL, best, range(1, args.seeds + 1))
    take_from(shortlist, final)
    runs += train_all(final, args)
    print("\n" + report(runs, args))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the study's own flags."""
    parser = argparse.ArgumentParser(
        description="Compare Muon with AdamW. Further flags go to Megatron.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/optimizer_study"), metavar="DIR")
    add("--data", type=Path, metavar="DIR", help="folder of prepare-data (default: make one)")
    form = "LR:DECOUPLED_LR:WARMUP:BETA1"
    for name, default, metavar in (
        ("muon", MUON_RECIPES, f"{form}:MOMENTUM"),
        ("adam", ADAM_RECIPES, form),
    ):
        add(
            f"--{name}-recipes",
            nargs="+",
            type=partial(_recipe, form=metavar),
            default=default,
            metavar=metavar,
            help="learning rates of hidden layers and of embedding and head, steps of warmup, "
            "AdamW's beta1 and Muon's momentum, to search",
        )
    add(
        "--muon-flags",
        default=MUON_FLAGS,
        metavar="FLAGS",
        help='of Muon alone: --muon-flags="--x y" (%(default)s)',
    )
    add(
        "--shortlist",
        type=positive,
        default=2,
        metavar="N",
        help="best recipes of the search to train to the full length (%(default)s)",
    )
    add("--seeds", type=positive, default=3, metavar="N", help="at the best recipe (%(default)s)")
    add("--steps", type=positive, default=160, metavar="N", help="of a final run (%(default)s)")
    add(
        "--search-steps",
        type=positive,
        default=80,
        metavar="N",
        help="of a run of the search (%(default)s)",
    )
    add(
        "--eval-interval",
        type=positive,
        default=5,
        metavar="N",
        help="steps between evaluations (%(default)s)",
    )
    study.add_jobs_flag(parser)
    return parser


def check_search(args: argparse.Namespace) -> None:
    """Refuse a search that is longer for one optimizer, and steps that do not fit.

    Raises:
        UserError: Names the flags and the remedy.
    """
    muon, adam = set(args.muon_recipes), set(args.adam_recipes)
    if len(muon) != len(adam):
        raise UserError(
            f"--muon-recipes has {len(muon)}, --adam-recipes {len(adam)}. Remedy: search as many "
            "for one as for the other."
        )
    if args.search_steps > args.steps:
        raise UserError(
            f"--search-steps {args.search_steps} is above --steps {args.steps}. Remedy: lower it: "
            "the best of the search are trained to the full length."
        )
    for flag, steps in (("--steps", args.steps), ("--search-steps", args.search_steps)):
        if steps % args.eval_interval:
            raise UserError(
                f"{flag} {steps} is no multiple of --eval-interval {args.eval_interval}. "
                "Remedy: change one of them."
            )


def common_flags(args: argparse.Namespace, data: Path) -> list[str]:
    """What all runs share: the tiny preset, warmed up as there and then at a constant rate."""
    flags = f"""
        --preset tiny --global-batch-size {BATCH_SIZE} --moe-aux-loss-coeff 1e-4
        --lr-decay-style constant --min-lr 0 --decoupled-min-lr 0
        --eval-interval {args.eval_interval} --eval-iters {EVAL_ITERS}
        --log-interval 10 --tensorboard-log-interval 10
    """.split()
    return [*flags, "--data", str(data), *study.LOGS_ONLY]


def phase_jobs(
    args: argparse.Namespace,
    common: Sequence[str],
    phase: str,
    recipes: Sequence[tuple[str, Recipe]],
    seeds: Sequence[int],
) -> list[Job]:
    """The runs of a phase, seed by seed.

    Args:
        args: The study's own flags.
        common: Flags of all runs.
        phase: ``SEARCH``, ``SHORTLIST`` or ``FINAL``.
        recipes: Key of ``LABELS`` and settings.
        seeds: As often is each recipe trained.
    """
    return [_job(args, common, phase, *recipe, seed) for seed in seeds for recipe in recipes]


def take_from(earlier: Sequence[Job], later: Sequence[Job]) -> None:
    """Copy the runs of a phase that an earlier one has trained: its seed, if they are as long."""
    trained = {job.flags: job.folder for job in earlier}
    for job in later:
        if job.flags in trained and not job.is_complete:
            shutil.rmtree(job.folder, ignore_errors=True)
            shutil.copytree(trained[job.flags], job.folder)


def train_all(jobs: Sequence[Job], args: argparse.Namespace) -> list[Run]:
    """Train what is not complete, on one thread each; returns all runs.

    Raises:
        UserError: A run failed; the others were stopped.
    """
    environment = build_environment(
        os.environ, num_ranks=1, num_cores=1, cuda=count_cuda_devices() > 0
    )
    environment.update(single_rank_environment())

    def read(job: Job) -> Run:
        return read_run(args.out, job.phase, job.optimizer, job.recipe, job.seed)

    def describe(job: Job) -> str:
        name = f"{LABELS[job.optimizer]}, {job.recipe}, seed {job.seed}"
        return f"{name}: validation loss {read(job).losses[-1]:.3f}"

    study.train_all(
        jobs,
        num_at_once=args.jobs,
        command=[sys.executable, "-u", str(TRAIN)],
        environment=environment,
        describe=describe,
    )
    return [read(job) for job in jobs]


def report(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """Write tables and picture; returns the tables and where everything is."""
    tables = write_results(runs, args.out, settings=study.settings_of(args))
    files = [args.out / "results.md", args.out / "results.json", draw_study(runs, args.out)]
    return tables + "\n\n" + "\n".join(map(str, files))


def _job(
    args: argparse.Namespace,
    common: Sequence[str],
    phase: str,
    optimizer: str,
    recipe: Recipe,
    seed: int,
) -> Job:
    steps = args.search_steps if phase == SEARCH else args.steps
    flags = [*common, "--train-iters", str(steps), "--optimizer", optimizer, "--seed", str(seed)]
    flags += ["--lr", f"{recipe.lr:g}", "--decoupled-lr", f"{recipe.decoupled_lr:g}"]
    flags += ["--lr-warmup-iters", str(recipe.warmup)]
    flags += ["--adam-beta1", f"{recipe.beta1:g}"]
    if optimizer == "muon":
        flags += ["--muon-momentum", f"{recipe.momentum:g}", *shlex.split(args.muon_flags)]
    folder = run_folder(args.out, phase, optimizer, recipe, seed)
    return Job(folder, tuple(flags), phase, optimizer, recipe, seed)


def _recipe(text: str, *, form: str) -> Recipe:
    try:
        lr, decoupled_lr, warmup, *momenta = text.split(":")
        if len(momenta) != form.count(":") - 2:
            raise ValueError
        return Recipe(float(lr), float(decoupled_lr), int(warmup), *map(float, momenta))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no {form}") from None


if __name__ == "__main__":
    sys.exit(main())
