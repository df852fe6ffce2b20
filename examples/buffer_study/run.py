"""Train on clustered documents in four orders, several seeds each, and compare how even they are.

    python examples/buffer_study/run.py
    python examples/buffer_study/run.py --seeds 5 --arms sequential rsdb

Sequential packing, twice, with clusters of about a sequence and longer than a batch; Megatron's
shuffled sequences; the random sequential document buffer.  The same documents, weights and tokens.
A run that is complete is not trained again.  Any further flag goes to Megatron, for all runs alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

import study
from clustered_text import write_clustered
from plot import draw_study
from results import ARMS, Run, read_run, run_folder, write_results
from study import positive

VOCAB_SIZE, VALIDATION_FRACTION, EVAL_ITERS = 2048, 0.1, 8
# Documents of the buffer of each stream; one stream for each sequence of a batch.
BUFFER_DOCUMENTS = 32


@dataclass(frozen=True)
class Job(study.Job):
    """A run to train.

    Attributes:
        arm: Key of ``ARMS``.
        seed: Of the initial weights, the order of the clusters and that of the documents.
    """

    arm: str
    seed: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    args, megatron_flags = build_parser().parse_known_args(argv)
    return study.run_study("buffer study", args.out, lambda: compare_orders(args, megatron_flags))


def compare_orders(args: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Train and report."""
    jobs = list(build_jobs(args, megatron_flags))
    study.train_all(
        jobs,
        num_at_once=args.jobs,
        command=[*study.CLI, "train"],
        environment=study.one_thread(),
        describe=describe,
    )
    ordered = sorted(jobs, key=lambda job: (list(ARMS).index(job.arm), job.seed))
    print("\n" + report([read_run(args.out, job.arm, job.seed) for job in ordered], args))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the study's own flags."""
    parser = argparse.ArgumentParser(
        description="Compare orders of clustered documents. Further flags go to Megatron.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/buffer_study"), metavar="DIR")
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds of each arm (%(default)s)")
    add("--steps", type=positive, default=70, metavar="N", help="steps of a run (%(default)s)")
    study.add_jobs_flag(parser)
    add("--seq-length", type=positive, default=512, metavar="N", help="tokens (%(default)s)")
    add(
        "--global-batch-size",
        type=positive,
        default=6,
        metavar="N",
        help="sequences, each a micro-batch (%(default)s)",
    )
    add(
        "--cluster-bytes",
        type=positive,
        nargs=2,
        default=(1200, 65_536),
        metavar=("SHORT", "LONG"),
        help="bytes of a cluster, for the two sequential arms (%(default)s)",
    )
    return parser


def build_jobs(args: argparse.Namespace, megatron_flags: Sequence[str]) -> Iterator[Job]:
    """The runs, seed by seed: a study that is cut short has all arms of the first seeds."""
    flags = f"""
        --preset tiny --nproc 1 --seq-length {args.seq_length} --train-iters {args.steps}
        --global-batch-size {args.global_batch_size} --micro-batch-size 1
        --eval-interval {args.steps + 1} --eval-iters {EVAL_ITERS}
        --log-interval 10 --tensorboard-log-interval 1
    """.split()
    for seed in range(1, args.seeds + 1):
        for name in dict.fromkeys(args.arms):
            mixture = prepare_arm(name, seed, args)
            own = [*flags, *study.LOGS_ONLY, "--data", str(mixture), "--seed", str(seed)]
            folder = run_folder(args.out, name, seed)
            yield Job(folder, (*own, *megatron_flags), name, seed)


def prepare_arm(name: str, seed: int, args: argparse.Namespace) -> Path:
    """The file of the mixture of an arm, whose data are prepared if they are not there.

    All data have the tokenizer of the first that were prepared, and the same documents for
    validation: these are chosen by their text.
    """
    arm, folder = ARMS[name], (args.out / "data").resolve()
    label = "long" if arm.has_long_clusters else "short"
    _prepare("short", 1, folder, args)
    corpus = _prepare(label, seed, folder, args)
    streams = args.global_batch_size
    path = folder / f"{name}_{seed}.yaml"
    path.write_text(
        f"corpora: {{clustered: {{path: {corpus.name}}}}}\n"
        "phases: [{weights: {clustered: 1}}]\n"
        f"order: {arm.order}\n"
        + (
            f"rsdb: {{documents: {BUFFER_DOCUMENTS}, streams: {streams}}}\n"
            if arm.order == "rsdb"
            else ""
        )
    )
    return path


def _prepare(label: str, seed: int, folder: Path, args: argparse.Namespace) -> Path:
    out, tokenizer = folder / f"{label}_{seed}", folder / "short_1" / "tokenizer"
    if (out / "manifest.json").is_file():
        return out
    source = folder / f"{label}_{seed}.jsonl"
    write_clustered(source, cluster_bytes=args.cluster_bytes[label == "long"], seed=seed)
    command = [*study.CLI, "prepare-data", "--out", str(out), "--source", str(source)]
    command += ["--validation-fraction", str(VALIDATION_FRACTION)]
    is_first = out == tokenizer.parent
    command += ["--vocab-size", str(VOCAB_SIZE)] if is_first else ["--tokenizer", str(tokenizer)]
    subprocess.run(command, env=study.one_thread(), check=True)
    return out


def describe(job: Job) -> str:
    """What a complete run came to."""
    numbers = read_run(job.folder.parents[1], job.arm, job.seed).numbers
    return (
        f"{ARMS[job.arm].label}, seed {job.seed}: BatchHet {numbers['batch_het']:.3f}, "
        f"validation loss {numbers['validation_loss']:.3f}"
    )


def report(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """Write table and picture; returns the table and where everything is."""
    table = write_results(runs, args.out, settings=study.settings_of(args))
    files = [args.out / "results.md", args.out / "results.json", draw_study(runs, args.out)]
    return table + "\n\n" + "\n".join(map(str, files))


if __name__ == "__main__":
    sys.exit(main())
