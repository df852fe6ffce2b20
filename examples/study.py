"""What studies share: train each run once, some at the same time, and say how far they are."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from trinity_megatron.errors import UserError

CLI = (sys.executable, "-m", "trinity_megatron.cli")
COMPLETE_NAME, LOG_NAME = "complete.json", "train.log"
# Neither checkpoints nor W&B: the TensorBoard file is all that is read.
LOGS_ONLY = ("--save", "", "--load", "", "--wandb-project", "")


@dataclass(frozen=True)
class Job:
    """A run to train; the job of a study says more.

    Attributes:
        folder: Where it goes.
        flags: Of ``trinity-megatron train``, without ``--out``.
    """

    folder: Path
    flags: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether it was trained to its end.

        Raises:
            UserError: It was, with other flags.
        """
        path = self.folder / COMPLETE_NAME
        if not path.is_file():
            return False
        if json.loads(path.read_text())["flags"] != list(self.flags):
            raise UserError(
                f"{self.folder} holds a run with other flags (see {path}). Remedy: give another "
                "--out, or remove the folder."
            )
        return True


def run_study(name: str, out: Path, work: Callable[[], None]) -> int:
    """Do the work of a study alone in its folder; returns the exit code.

    Args:
        name: Of the study, for its messages.
        out: Its folder; made if it is missing.
        work: What is to be done; an error that it raises is printed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs end with the study
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            work()
    except Timeout:
        print(f"{name}: error: another study runs in --out {out}", file=sys.stderr)
        return 2
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def add_jobs_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--jobs``."""
    parser.add_argument(
        "--jobs", type=positive, default=2, metavar="N", help="runs at the same time (%(default)s)"
    )


def train_all[SomeJob: Job](
    jobs: Sequence[SomeJob],
    *,
    num_at_once: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    describe: Callable[[SomeJob], str],
) -> None:
    """Train what is not complete, some at the same time, with a line for each that ends.

    Args:
        jobs: All runs.
        num_at_once: How many at a time.
        command: What takes the flags of a job.
        environment: Of the runs.
        describe: What to say of a complete run.

    Raises:
        UserError: A run failed; the others were stopped.  Names its log.
    """
    waiting, begin = [job for job in jobs if not job.is_complete], time.monotonic()
    running: dict[subprocess.Popen, tuple[SomeJob, float]] = {}
    total = len(waiting)
    if total:
        print(f"{total} runs, {num_at_once} at a time", flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < num_at_once:
                job = waiting.pop(0)
                running[_start(job, command, environment)] = job, time.monotonic()
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                job, start = running.pop(process)
                _finish(job, process.returncode, time.monotonic() - start)
                done = total - len(waiting) - len(running)
                minutes = (time.monotonic() - begin) / done * (total - done) / 60
                print(
                    f"[{done}/{total}] {describe(job)}; about {minutes:.0f} min to go", flush=True
                )
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def one_thread() -> dict[str, str]:
    """The environment of a run with one thread; what the user has set takes precedence."""
    return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}


def prepare_text(folder: Path, *flags: str) -> Path:
    """Prepare Python's standard library, as ``make train`` does; returns the folder.

    Args:
        folder: Where the data go; they are kept if they are there.
        flags: Further ones of ``prepare-data``.

    Raises:
        CalledProcessError: The command failed.
    """
    subprocess.run([*CLI, "prepare-data", "--out", str(folder), *flags], check=True)
    return folder


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What a study was started with, for JSON."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }


def positive(text: str) -> int:
    """A whole number from 1 on, as the type of a flag."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _start(job: Job, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    shutil.rmtree(job.folder, ignore_errors=True)  # of a run that was cut short
    job.folder.mkdir(parents=True)
    with (job.folder / LOG_NAME).open("w") as log:
        return subprocess.Popen(
            [*command, *job.flags, "--out", str(job.folder)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _finish(job: Job, code: int, seconds: float) -> None:
    if code != 0:
        log = job.folder / LOG_NAME
        last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise UserError(f"a run ended with code {code}; {log}:\n{last}")
    content = {"flags": list(job.flags), "seconds": round(seconds, 1)}
    (job.folder / COMPLETE_NAME).write_text(json.dumps(content, indent=1) + "\n")
