"""Train the rules of the expert bias side by side, several seeds each, and compare their balance.

    python examples/balance_study/run.py
    python examples/balance_study/run.py --rules sign smebu --seeds 5 --update-rate 5e-3

The tiny preset with 64 experts, top-4, on skewed text, without a balance loss: only the rule acts.
A run that is complete is not trained again.  Any further flag goes to Megatron, for all runs alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

import study
from plot import draw_study
from results import LABELS, Run, read_run, run_folder, write_results
from study import positive

# SMEBU differs from "sign_momentum" in what replaces the sign, from "linear" in the tanh.
RULES = {
    "none": "--moe-router-bias-update-rule none",
    "sign": "--moe-router-bias-update-rule sign --moe-router-bias-momentum 0",
    "smebu": "--moe-router-bias-update-rule smebu --moe-router-bias-momentum 0.5 "
    "--moe-router-bias-clamp-scale 2",
    "sign_momentum": "--moe-router-bias-update-rule sign --moe-router-bias-momentum 0.5",
    "linear": "--moe-router-bias-update-rule linear --moe-router-bias-momentum 0.5 "
    "--moe-router-bias-clamp-scale 2",
}
NUM_EXPERTS, TOPK = 64, 4
VOCAB_SIZE, VALIDATION_FRACTION, EVAL_ITERS = 2048, 0.1, 16
# Files of the broad tenth are short, so that it holds many.
_BROAD_SHARE, _MAX_BROAD_BYTES = 0.1, 16_384


@dataclass(frozen=True)
class Job(study.Job):
    """A run to train.

    Attributes:
        rule: Key of :data:`RULES`.
        seed: Of the initial weights and of the order of the data.
    """

    rule: str
    seed: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    args, megatron_flags = build_parser().parse_known_args(argv)
    return study.run_study("balance study", args.out, lambda: compare_rules(args, megatron_flags))


def compare_rules(args: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Train and report."""
    data = args.data or prepare_skewed_data(args.out / "data")
    jobs = list(build_jobs(args, data.resolve(), megatron_flags))
    study.train_all(
        jobs,
        num_at_once=args.jobs,
        command=[*study.CLI, "train"],
        environment=study.one_thread(),
        describe=describe,
    )
    runs = [read_run(args.out, job.rule, job.seed) for job in sorted(jobs, key=_rule_order)]
    print("\n" + report(runs, args))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the study's own flags."""
    parser = argparse.ArgumentParser(
        description="Compare the rules of the expert bias. Further flags go to Megatron.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/balance_study"), metavar="DIR")
    add("--data", type=Path, metavar="DIR", help="folder of prepare-data (default: skewed text)")
    add("--rules", nargs="+", choices=list(RULES), default=list(RULES), metavar="RULE")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds of each rule (%(default)s)")
    add("--steps", type=positive, default=120, metavar="N", help="steps of a run (%(default)s)")
    study.add_jobs_flag(parser)
    add("--update-rate", type=float, default=1e-2, help="of all rules (%(default)s)")
    add("--seq-length", type=positive, default=64, metavar="N", help="tokens (%(default)s)")
    add(
        "--global-batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="sequences (%(default)s)",
    )
    return parser


def prepare_skewed_data(folder: Path) -> Path:
    """Nine tenths of the bytes are the character tables of ``encodings``, one tenth other modules.

    The tables are thousands of lines of one form.  A router that follows the text sends most of it
    to the experts that know this form.
    """
    library = Path(sysconfig.get_path("stdlib"))
    narrow = library / "encodings"
    wanted = _BROAD_SHARE / (1 - _BROAD_SHARE) * sum(f.stat().st_size for f in narrow.glob("*.py"))
    broad, size = [], 0
    # In an order that has nothing to do with their content.
    for file in sorted(library.glob("*.py"), key=lambda f: zlib.crc32(f.name.encode())):
        if size < wanted and 0 < file.stat().st_size <= _MAX_BROAD_BYTES:
            broad.append(file)
            size += file.stat().st_size
    command = [*study.CLI, "prepare-data", "--out", str(folder)]
    command += ["--vocab-size", str(VOCAB_SIZE)]
    command += ["--validation-fraction", str(VALIDATION_FRACTION)]
    command += ["--source", str(narrow), *map(str, broad)]
    subprocess.run(command, env=study.one_thread(), check=True)
    return folder


def build_jobs(
    args: argparse.Namespace, data: Path, megatron_flags: Sequence[str]
) -> Iterator[Job]:
    """The runs, seed by seed: a study that is cut short has all rules of the first seeds."""
    flags = f"""
        --preset tiny --nproc 1 --num-experts {NUM_EXPERTS} --moe-router-topk {TOPK}
        --seq-length {args.seq_length} --train-iters {args.steps}
        --global-batch-size {args.global_batch_size} --micro-batch-size {args.global_batch_size}
        --moe-router-load-balancing-type none --moe-aux-loss-coeff 0
        --moe-router-bias-update-rate {args.update_rate}
        --eval-interval {args.steps + 1} --eval-iters {EVAL_ITERS}
        --log-interval 10 --tensorboard-log-interval 1
    """.split()
    flags += ["--data", str(data), *study.LOGS_ONLY]
    for seed in range(1, args.seeds + 1):
        for rule in dict.fromkeys(args.rules):
            own = [*flags, *RULES[rule].split(), "--seed", str(seed), *megatron_flags]
            yield Job(run_folder(args.out, rule, seed), tuple(own), rule, seed)


def describe(job: Job) -> str:
    """What a complete run came to."""
    numbers = read_run(job.folder.parents[1], job.rule, job.seed).numbers
    return (
        f"{LABELS[job.rule]}, seed {job.seed}: MaxVio {numbers['steady_violation']:.3f}, "
        f"validation loss {numbers['validation_loss']:.3f}"
    )


def report(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """Write table and pictures; returns the table and where everything is."""
    table = write_results(runs, args.out, settings=study.settings_of(args), topk=TOPK)
    content = json.loads((args.out / "results.json").read_text())
    floor = content["noise_floor"]["steady_violation"]
    pictures = draw_study(runs, args.out, noise_floor=floor)
    files = [args.out / "results.md", args.out / "results.json", *pictures]
    return table + "\n\n" + "\n".join(map(str, files))


def _rule_order(job: Job) -> tuple[int, int]:
    return list(RULES).index(job.rule), job.seed


if __name__ == "__main__":
    sys.exit(main())
