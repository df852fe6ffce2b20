"""Train the tiny preset with Muon and with AdamW, and compare the steps to the same loss.

    python examples/optimizer_study/run.py
    python examples/optimizer_study/run.py --seeds 5 --steps 400

First a search, as many pairs of learning rates for one as for the other on one seed, then all seeds
at the best of each.  A run that is complete is not trained again.  Any further flag goes to
Megatron, for all runs alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from plot import draw_study
from results import (
    FINAL,
    LABELS,
    SEARCH,
    SEARCH_SEED,
    Rates,
    Run,
    find_best,
    read_run,
    run_folder,
    write_results,
)

from trinity_megatron.launcher import (
    build_environment,
    count_cuda_devices,
    single_rank_environment,
)

# Around where each is expected, as many for one as for the other: the learning rate of the hidden
# layers in factors of two, and other rates for the embedding and the head beside the middle one.
MUON_RATES = (
    Rates(0.02, 0.024),
    Rates(0.04, 0.012),
    Rates(0.04, 0.024),
    Rates(0.04, 0.048),
    Rates(0.08, 0.024),
)
ADAM_RATES = (
    Rates(0.002, 0.012),
    Rates(0.004, 0.012),
    Rates(0.008, 0.008),
    Rates(0.008, 0.016),
    Rates(0.016, 0.016),
)
MUON_FLAGS = "--muon-nesterov"
BATCH_SIZE, EVAL_ITERS = 32, 2
COMPLETE_NAME, LOG_NAME = "complete.json", "train.log"
TRAIN = Path(__file__).with_name("train.py")


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        phase: ``SEARCH`` or ``FINAL``.
        optimizer: Key of ``LABELS``.
        rates: Its learning rates.
        seed: Of the initial weights and of the order of the data.
        folder: Where it goes.
        flags: Of ``trinity-megatron train``, without ``--out``.
    """

    phase: str
    optimizer: str
    rates: Rates
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
        check_search(args)
        with FileLock(args.out / ".lock", timeout=0):
            data = (args.data or prepare_text(args.out / "data")).resolve()
            common = common_flags(args, data)
            search = list(search_jobs(args, common, megatron_flags))
            runs = train_all(search, args)
            best = [find_best(runs, optimizer) for optimizer in LABELS]
            repeats = list(seed_jobs(args, best, common, megatron_flags))
            runs += train_all(repeats, args)
            print("\n" + report(runs, args))
    except Timeout:
        print(f"optimizer study: error: another study runs in --out {args.out}", file=sys.stderr)
        return 2
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"optimizer study: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the study's own flags."""
    parser = argparse.ArgumentParser(
        description="Compare Muon with AdamW. Further flags go to Megatron.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/optimizer_study"), metavar="DIR")
    add("--data", type=Path, metavar="DIR", help="folder of prepare-data (default: make one)")
    for name, default in (("muon", MUON_RATES), ("adam", ADAM_RATES)):
        add(
            f"--{name}-rates",
            nargs="+",
            type=_rates,
            default=default,
            metavar="LR:DECOUPLED_LR",
            help="learning rates of the hidden layers, and of embedding and head, to search",
        )
    add(
        "--muon-flags",
        default=MUON_FLAGS,
        metavar="FLAGS",
        help='of Muon alone: --muon-flags="--x y" (%(default)s)',
    )
    add("--seeds", type=_positive, default=3, metavar="N", help="at the best rates (%(default)s)")
    add("--steps", type=_positive, default=140, metavar="N", help="of a final run (%(default)s)")
    add(
        "--search-steps",
        type=_positive,
        default=80,
        metavar="N",
        help="of a run of the search (%(default)s)",
    )
    add(
        "--eval-interval",
        type=_positive,
        default=5,
        metavar="N",
        help="steps between evaluations (%(default)s)",
    )
    add(
        "--jobs", type=_positive, default=2, metavar="N", help="runs at the same time (%(default)s)"
    )
    return parser


def check_search(args: argparse.Namespace) -> None:
    """Refuse a search that is longer for one optimizer, and steps that end without evaluation.

    Raises:
        ValueError: Names the flags and the remedy.
    """
    muon, adam = set(args.muon_rates), set(args.adam_rates)
    if len(muon) != len(adam):
        raise ValueError(
            f"--muon-rates has {len(muon)} pairs, --adam-rates {len(adam)}. Remedy: search as many "
            "for one as for the other."
        )
    for flag, steps in (("--steps", args.steps), ("--search-steps", args.search_steps)):
        if steps % args.eval_interval:
            raise ValueError(
                f"{flag} {steps} is no multiple of --eval-interval {args.eval_interval}. "
                "Remedy: change one of them."
            )


def prepare_text(folder: Path) -> Path:
    """Python's standard library, as ``make train`` prepares it."""
    command = [sys.executable, "-m", "trinity_megatron.cli", "prepare-data", "--out", str(folder)]
    subprocess.run(command, check=True)
    return folder


def common_flags(args: argparse.Namespace, data: Path) -> list[str]:
    """What all runs share: the tiny preset, warmed up as there and then at a constant rate."""
    flags = f"""
        --preset tiny --global-batch-size {BATCH_SIZE}
        --lr-decay-style constant --min-lr 0 --decoupled-min-lr 0
        --eval-interval {args.eval_interval} --eval-iters {EVAL_ITERS}
        --log-interval 10 --tensorboard-log-interval 10
    """.split()
    # Neither checkpoints nor W&B: the TensorBoard file is all that is read.
    return [*flags, "--data", str(data), "--save", "", "--load", "", "--wandb-project", ""]


def search_jobs(
    args: argparse.Namespace, common: Sequence[str], megatron_flags: Sequence[str]
) -> Iterator[Job]:
    """The runs of the search, on one seed."""
    for optimizer, pairs in (("muon", args.muon_rates), ("adam", args.adam_rates)):
        for rates in sorted(set(pairs)):
            yield _job(args, SEARCH, optimizer, rates, SEARCH_SEED, common, megatron_flags)


def seed_jobs(
    args: argparse.Namespace,
    best: Sequence[Run],
    common: Sequence[str],
    megatron_flags: Sequence[str],
) -> Iterator[Job]:
    """All seeds at the best learning rates, seed by seed."""
    for seed in range(1, args.seeds + 1):
        for run in best:
            yield _job(args, FINAL, run.optimizer, run.rates, seed, common, megatron_flags)


def train_all(jobs: Sequence[Job], args: argparse.Namespace) -> list[Run]:
    """Train what is not complete, some at the same time, with a line for each that ends.

    Raises:
        ValueError: A run failed; the others were stopped.  Names its log.
    """
    waiting = [job for job in jobs if not job.is_complete]
    running: dict[Job, subprocess.Popen] = {}
    total, begin = len(waiting), time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                job = waiting.pop(0)
                running[job] = _start(job)
            time.sleep(0.2)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                _finish(job, running.pop(job).returncode)
                run = read_run(args.out, job.phase, job.optimizer, job.rates, job.seed)
                done = total - len(waiting) - len(running)
                minutes = (time.monotonic() - begin) / done * (total - done) / 60
                print(
                    f"[{done}/{total}] {LABELS[job.optimizer]}, learning rates {job.rates}, seed "
                    f"{job.seed}: validation loss {run.losses[-1]:.3f}; about {minutes:.0f} min "
                    "to go",
                    flush=True,
                )
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return [read_run(args.out, job.phase, job.optimizer, job.rates, job.seed) for job in jobs]


def report(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """Write tables and picture; returns the tables and where everything is."""
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    tables = write_results(runs, args.out, settings=settings)
    files = [args.out / "results.md", args.out / "results.json", draw_study(runs, args.out)]
    return tables + "\n\n" + "\n".join(map(str, files))


def _job(
    args: argparse.Namespace,
    phase: str,
    optimizer: str,
    rates: Rates,
    seed: int,
    common: Sequence[str],
    megatron_flags: Sequence[str],
) -> Job:
    steps = args.search_steps if phase == SEARCH else args.steps
    flags = [*common, "--train-iters", str(steps), "--optimizer", optimizer, "--seed", str(seed)]
    flags += ["--lr", f"{rates.lr:g}", "--decoupled-lr", f"{rates.decoupled_lr:g}"]
    if optimizer == "muon":
        flags += shlex.split(args.muon_flags)
    folder = run_folder(args.out, phase, optimizer, rates, seed)
    return Job(phase, optimizer, rates, seed, folder, (*flags, *megatron_flags))


def _start(job: Job) -> subprocess.Popen:
    shutil.rmtree(job.folder, ignore_errors=True)  # of a run that was cut short
    job.folder.mkdir(parents=True)
    command = [sys.executable, "-u", str(TRAIN), *job.flags, "--out", str(job.folder)]
    # One thread a run; whatever the user has set takes precedence.
    environment = build_environment(
        os.environ, num_ranks=1, num_cores=1, cuda=count_cuda_devices() > 0
    )
    environment.update(single_rank_environment())
    with (job.folder / LOG_NAME).open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _finish(job: Job, code: int) -> None:
    if code != 0:
        log = job.folder / LOG_NAME
        last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise ValueError(
            f"{LABELS[job.optimizer]}, learning rates {job.rates}, seed {job.seed}, ended with "
            f"code {code}; {log}:\n{last}"
        )
    content = {"flags": list(job.flags)}
    (job.folder / COMPLETE_NAME).write_text(json.dumps(content, indent=1) + "\n")


def _rates(text: str) -> Rates:
    try:
        lr, decoupled_lr = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no LR:DECOUPLED_LR") from None
    return Rates(lr, decoupled_lr)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs end with the study
    sys.exit(main())
