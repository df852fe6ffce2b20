"""Train the rules of the expert bias side by side, several seeds each, and compare their balance.

    python examples/balance_study/run.py
    python examples/balance_study/run.py --rules sign smebu --seeds 5 --update-rate 5e-3

The tiny preset with 64 experts, top-4, on skewed text, without a balance loss: only the rule acts.
A run that is complete is not trained again.  Any further flag goes to Megatron, for all runs alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from plot import draw_study
from results import LABELS, Run, read_run, run_folder, write_results

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
COMPLETE_NAME, LOG_NAME = "complete.json", "train.log"
# Files of the broad tenth are short, so that it holds many.
_BROAD_SHARE, _MAX_BROAD_BYTES = 0.1, 16_384


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        rule: Key of :data:`RULES`.
        seed: Of the initial weights and of the order of the data.
        folder: Where it goes.
        flags: Of ``trinity-megatron train``, without ``--out``.
    """

    rule: str
    seed: int
    folder: Path
    flags: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether it was trained to its end.

        Raises:
            ValueError: It was, with other flags.
        """
        path = self.folder / COMPLETE_NAME
        if not path.is_file():
            return False
        if json.loads(path.read_text())["flags"] != list(self.flags):
            raise ValueError(
                f"{self.folder} holds a run with other flags (see {path}). Remedy: give another "
                "--out, or remove the folder."
            )
        return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    args, megatron_flags = build_parser().parse_known_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(args.out / ".lock", timeout=0):
            data = args.data or prepare_skewed_data(args.out / "data")
            jobs = list(build_jobs(args, data.resolve(), megatron_flags))
            train_all([job for job in jobs if not job.is_complete], args.jobs)
            runs = [read_run(args.out, job.rule, job.seed) for job in sorted(jobs, key=_rule_order)]
            print("\n" + report(runs, args))
    except Timeout:
        print(f"balance study: error: another study runs in --out {args.out}", file=sys.stderr)
        return 2
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"balance study: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


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
    add("--seeds", type=_positive, default=3, metavar="N", help="seeds of each rule (%(default)s)")
    add("--steps", type=_positive, default=120, metavar="N", help="steps of a run (%(default)s)")
    add(
        "--jobs", type=_positive, default=2, metavar="N", help="runs at the same time (%(default)s)"
    )
    add("--update-rate", type=float, default=1e-2, help="of all rules (%(default)s)")
    add("--seq-length", type=_positive, default=64, metavar="N", help="tokens (%(default)s)")
    add(
        "--global-batch-size",
        type=_positive,
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
    command = _cli("prepare-data", "--out", str(folder), "--vocab-size", str(VOCAB_SIZE))
    command += ["--validation-fraction", str(VALIDATION_FRACTION)]
    command += ["--source", str(narrow), *map(str, broad)]
    subprocess.run(command, env=_environment(), check=True)
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
    # Neither checkpoints nor W&B: the TensorBoard file is all that is read.
    flags += ["--data", str(data), "--save", "", "--load", "", "--wandb-project", ""]
    for seed in range(1, args.seeds + 1):
        for rule in dict.fromkeys(args.rules):
            own = [*flags, *RULES[rule].split(), "--seed", str(seed), *megatron_flags]
            yield Job(rule, seed, run_folder(args.out, rule, seed), tuple(own))


def train_all(jobs: Sequence[Job], num_at_once: int) -> None:
    """Train the runs, some at the same time, with a line for each that ends.

    Raises:
        ValueError: A run failed; the others were stopped.  Names its log.
    """
    waiting, begin = list(jobs), time.monotonic()
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    if jobs:
        print(f"{len(jobs)} runs, {num_at_once} at a time", flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < num_at_once:
                job = waiting.pop(0)
                running[_start(job)] = (job, time.monotonic())
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                job, start = running.pop(process)
                _finish(job, process.returncode, time.monotonic() - start)
                done = len(jobs) - len(waiting) - len(running)
                _say_progress(job, done, len(jobs), time.monotonic() - begin)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def report(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """Write table and pictures; returns the table and where everything is."""
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    table = write_results(runs, args.out, settings=settings, topk=TOPK)
    content = json.loads((args.out / "results.json").read_text())
    floor = content["noise_floor"]["steady_violation"]
    pictures = draw_study(runs, args.out, noise_floor=floor)
    files = [args.out / "results.md", args.out / "results.json", *pictures]
    return table + "\n\n" + "\n".join(map(str, files))


def _start(job: Job) -> subprocess.Popen:
    shutil.rmtree(job.folder, ignore_errors=True)  # of a run that was cut short
    job.folder.mkdir(parents=True)
    command = _cli("train", *job.flags, "--out", str(job.folder))
    with (job.folder / LOG_NAME).open("w") as log:
        return subprocess.Popen(command, env=_environment(), stdout=log, stderr=subprocess.STDOUT)


def _finish(job: Job, code: int, seconds: float) -> None:
    if code != 0:
        log = job.folder / LOG_NAME
        last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise ValueError(f"{job.rule}, seed {job.seed}, ended with code {code}; {log}:\n{last}")
    content = {"flags": list(job.flags), "seconds": round(seconds, 1)}
    (job.folder / COMPLETE_NAME).write_text(json.dumps(content, indent=1) + "\n")


def _say_progress(job: Job, done: int, total: int, seconds: float) -> None:
    run = read_run(job.folder.parents[1], job.rule, job.seed)
    minutes = seconds / done * (total - done) / 60
    print(
        f"[{done}/{total}] {LABELS[job.rule]}, seed {job.seed}: MaxVio "
        f"{run.numbers['steady_violation']:.3f}, validation loss "
        f"{run.numbers['validation_loss']:.3f}; about {minutes:.0f} min to go",
        flush=True,
    )


def _cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trinity_megatron.cli", *arguments]


def _environment() -> dict[str, str]:
    """One thread a run; whatever the user has set takes precedence."""
    return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _rule_order(job: Job) -> tuple[int, int]:
    return list(RULES).index(job.rule), job.seed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs end with the study
    sys.exit(main())
