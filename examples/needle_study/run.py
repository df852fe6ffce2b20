"""Train a small model at 512 tokens, extend it to 4096, and ask it for needles near and far.

    python examples/needle_study/run.py
    python examples/needle_study/run.py --seeds 2

Three checkpoints of each seed: before the extension; extended as docs/context.md says, with longer
sequences and nothing else of the model changed; and, to tell longer sequences from more training,
one that goes on for as many tokens at the old length.  All are asked the same questions.  A run
that is complete is not trained again.  Any further flag goes to Megatron, for all runs alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

import study
from corpora import prepare_corpora
from plot import draw_study
from results import (
    ARMS,
    LONG_LENGTH,
    SHORT_LENGTH,
    find_evaluation,
    read_run,
    run_folder,
    task_name,
    write_results,
)
from results import GROUPS as DISTANCES
from study import positive

# Tokens of a batch: many small ones before, then one long sequence.
BATCH_TOKENS = {"short": 2048, "continued": 4096, "extended": 4096}
# Of Muon, and of AdamW for embedding, head and norms.  The extension follows the report (3.5) for
# Nano and Mini: up again to a tenth of the peak, then linearly to 0.
PEAK, DECOUPLED_PEAK = 2e-2, 6e-3
MODEL = """
    --preset tiny --num-layers 2 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4
    --num-query-groups 2 --kv-channels 32 --window-size 63,0 --global-attn-every-n-layers 2
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 64
    --moe-shared-expert-intermediate-size 64
"""


@dataclass(frozen=True)
class Job(study.Job):
    """A run to train.

    Attributes:
        arm: Key of ``ARMS``.
        seed: Of the initial weights and the order of the data.
    """

    arm: str
    seed: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    args, megatron_flags = build_parser().parse_known_args(argv)
    return study.run_study("needle study", args.out, lambda: extend(args, megatron_flags))


def extend(args: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Train, extend, ask and report."""
    args.out = args.out.resolve()
    prepare_corpora(
        args.out,
        num_documents=tuple(args.documents),
        num_questions=args.questions,
        first_tokens=args.list_steps * BATCH_TOKENS["short"],
        environment=study.one_thread(),
    )
    arms = [arm for arm in ARMS if arm in {"short", *args.arms}]
    for arm in arms:  # the first one is where the others begin
        jobs = [make_job(arm, seed, args, megatron_flags) for seed in _seeds(args)]
        study.train_all(
            jobs,
            num_at_once=args.jobs,
            command=[*study.CLI, "train"],
            environment=study.one_thread(),
            describe=lambda job: f"{ARMS[job.arm].label}, seed {job.seed}",
        )
        for job in jobs:
            evaluate(job, args)
    runs = [read_run(args.out, arm, seed) for arm in arms for seed in _seeds(args)]
    table = write_results(runs, args.out, settings=study.settings_of(args))
    files = [args.out / "results.md", args.out / "results.json", draw_study(runs, args.out)]
    print("\n" + table + "\n\n" + "\n".join(map(str, files)))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the study's own flags."""
    parser = argparse.ArgumentParser(
        description="Extend a context, and ask for needles. Further flags go to Megatron.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/needle_study"), metavar="DIR")
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    add("--seeds", type=positive, default=1, metavar="N", help="(%(default)s)")
    add("--steps", type=positive, default=1000, metavar="N", help="before (%(default)s)")
    add(
        "--list-steps",
        type=positive,
        default=600,
        metavar="N",
        help="of these on lists (%(default)s)",
    )
    add(
        "--extension-steps",
        type=positive,
        default=100,
        metavar="N",
        help="of the extension (%(default)s)",
    )
    add(
        "--questions",
        type=positive,
        default=50,
        metavar="N",
        help="for each of the distances (%(default)s)",
    )
    add(
        "--documents",
        type=positive,
        nargs=3,
        default=(1600, 2600, 400),
        metavar=("LISTS", "SHORT", "LONG"),
        help="to train on: lists, and with needles short and long ones (%(default)s)",
    )
    study.add_jobs_flag(parser)
    parser.set_defaults(jobs=1)
    return parser


def make_job(arm: str, seed: int, args: argparse.Namespace, megatron_flags: Sequence[str]) -> Job:
    """The run of an arm."""
    flags = f"{MODEL} {_length(arm)} {_schedule(arm, args)} --nproc 1 --seed {seed}"
    flags += " --log-interval 10 --tensorboard-log-interval 10 --save-interval 100 --keep-last 1"
    own = [*flags.split(), "--wandb-project", "", "--dataloader-inter-document-masking"]
    own += ["--data", str(args.out / "data" / f"{arm}.yaml"), "--eval-iters", "0"]
    if arm != "short":
        parent = run_folder(args.out, "short", seed) / "checkpoints"
        own += ["--pretrained-checkpoint", str(parent)]
    return Job(run_folder(args.out, arm, seed), (*own, *megatron_flags), arm, seed)


def _length(arm: str) -> str:
    length = LONG_LENGTH if ARMS[arm].is_long else SHORT_LENGTH
    size = BATCH_TOKENS[arm] // length
    return (
        f"--seq-length {length} --max-position-embeddings {length} --global-batch-size {size} "
        f"--micro-batch-size {size}"
    )


def _schedule(arm: str, args: argparse.Namespace) -> str:
    if arm == "short":
        return (
            f"--train-iters {args.steps} --lr {PEAK} --min-lr {PEAK / 10} "
            f"--decoupled-lr {DECOUPLED_PEAK} --decoupled-min-lr {DECOUPLED_PEAK / 10}"
        )
    return (
        f"--train-iters {args.extension_steps} --lr-decay-style linear --lr-warmup-fraction 0.1 "
        f"--lr {PEAK / 10} --min-lr 0 --decoupled-lr {DECOUPLED_PEAK / 10} --decoupled-min-lr 0"
    )


def evaluate(job: Job, args: argparse.Namespace) -> None:
    """Ask a checkpoint everything, unless it has been asked.

    Raises:
        CalledProcessError: The command failed.
    """
    if find_evaluation(job.folder) is not None:
        return
    tasks = ",".join([*map(task_name, DISTANCES), "perplexity"])
    command = [*study.CLI, "evaluate", "--load", str(job.folder / "checkpoints"), "--tasks", tasks]
    command += ["--data", str(args.out / "questions"), "--max-length", str(LONG_LENGTH)]
    with (job.folder / "evaluate.log").open("w") as log:
        subprocess.run(command, env=study.one_thread(), stdout=log, stderr=log, check=True)


def _seeds(args: argparse.Namespace) -> range:
    return range(1, args.seeds + 1)


if __name__ == "__main__":
    sys.exit(main())
