"""Trainings of the suite: each is the real entry in a process of its own."""

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trinity_megatron.doctor.result import Deadline, Settings, SuiteError
from trinity_megatron.launch import local
from trinity_megatron.telemetry.tensorboard_log import RunLog

_LAST_LINES = 12
# Every step is timed and its loss kept; the statistics of our metrics are taken every fourth.
_COMMON = (
    "--log-interval",
    "1",
    "--log-timers-to-tensorboard",
    "--log-memory-to-tensorboard",
    "--eval-iters",
    "0",
    "--seed",
    "1234",
    "--lr-warmup-fraction",
    "0.1",
)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Folder of the run below ``runs/``.
        flags: For the training entry, without data and logs.
    """

    name: str
    flags: Sequence[str]


def environment(settings: Settings) -> dict[str, str]:
    """Variables of a child process on the chosen device; nothing is sent to W&B."""
    # On a CPU everything is so small that a second thread would only wait.
    cores = local.count_cores() if settings.on_gpu else 1
    values = local.build_environment(os.environ, num_ranks=1, num_cores=cores, cuda=settings.on_gpu)
    values |= local.single_rank_environment() | {"WANDB_MODE": "disabled"}
    if not settings.on_gpu:
        values["CUDA_VISIBLE_DEVICES"] = ""
    return values


def prepare(settings: Settings) -> Path:
    """Real text for the trainings: files of Python's standard library."""
    from trinity_megatron.data.prepare import prepare_data

    pattern, vocab_size = ("[a-z]*.py", 4096) if settings.on_gpu else ("[a-c]*.py", 512)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob(pattern))
    folder = settings.out / "data"
    prepare_data(folder, sources, vocab_size=vocab_size)
    return folder


def train(run: Run, settings: Settings, deadline: Deadline) -> Path:
    """Train in a fresh process, and keep what it prints in ``log.txt``.

    Args:
        run: What to train.
        settings: Where.
        deadline: Of the part; the run is stopped at its end.

    Returns:
        Folder of the run: ``tensorboard/`` and, with a profiler, ``torch_profile/``.

    Raises:
        SuiteError: The run failed or did not end in time; with the last lines it printed.
    """
    folder = settings.out / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*/*"):  # figures of an earlier suite would be read as this one's
        old.unlink()
    paths = ["--data", prepare(settings), "--data-cache-path", settings.out / "data_cache"]
    paths += ["--tensorboard-dir", folder / "tensorboard"]
    command = [sys.executable, "-m", "trinity_megatron.training", *map(str, paths)]
    log = folder / "log.txt"
    start = time.monotonic()
    try:
        with log.open("w") as output:
            done = subprocess.run(
                [*command, *_COMMON, *run.flags],
                env=environment(settings),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(deadline.remaining(), 1.0),
            )
    except subprocess.TimeoutExpired:
        raise SuiteError(
            f"{run.name}: stopped at the part's limit of {deadline.seconds:.0f} s; see {log}"
        ) from None
    deadline.observe_run(time.monotonic() - start)
    if done.returncode:
        last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        raise SuiteError(f"{run.name}: exit code {done.returncode}; {log} ends: {' / '.join(last)}")
    return folder


def log_of(folder: Path) -> RunLog:
    """What a run has logged."""
    return RunLog(folder / "tensorboard")
