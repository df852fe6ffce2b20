"""Ctrl-C and SIGTERM: the run saves, says so by its exit code, and goes on where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.functional_tests.launch import SMALL, environment
from trinity_megatron.launcher import count_cuda_devices
from trinity_megatron.tracking.run_log import RunLog

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(count_cuda_devices() > 0, reason="on by default without a GPU only"),
]
STEPS = 400


def start(data: Path, out: Path, ranks: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--nproc", str(ranks)]
    command += [*SMALL, "--data", str(data), "--out", str(out), "--save-interval", "1000"]
    return subprocess.Popen(
        [*command, *flags],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group, as a terminal makes one
    )


def wait_for_steps(process: subprocess.Popen, count: int) -> None:
    """Read what the run prints until it has made so many steps."""
    assert process.stdout is not None
    for line in process.stdout:
        if b" iteration " in line and f"{count}/".encode() in line.replace(b" ", b""):
            return
    raise AssertionError("the run has ended by itself")


@pytest.mark.parametrize(
    ("ranks", "signum", "code"), [(1, signal.SIGTERM, 143), (2, signal.SIGINT, 130)]
)
def test_it_saves_and_goes_on(
    ranks: int, signum: int, code: int, data: Path, tmp_path: Path
) -> None:
    first = start(data, tmp_path, ranks, "--train-iters", str(STEPS))
    wait_for_steps(first, 5)
    began = time.monotonic()
    if signum == signal.SIGINT:
        os.killpg(first.pid, signum)
    else:
        first.send_signal(signum)
    output = first.communicate(timeout=60)[0].decode()
    assert first.returncode == code, output
    assert time.monotonic() - began < 20
    reached = int((tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 5 <= reached < STEPS

    # The end of the schedule stays, the run is stopped.
    second = start(
        data, tmp_path, ranks, "--train-iters", str(STEPS), "--exit-interval", str(reached + 3)
    )
    output = second.communicate(timeout=120)[0].decode()
    assert second.returncode == 0, output
    steps = list(RunLog(tmp_path / "tensorboard").scalars("lm loss"))
    assert steps == list(range(1, reached + 4))


def test_two_runs_do_not_write_one_folder(data: Path, tmp_path: Path) -> None:
    first = start(data, tmp_path, 1, "--train-iters", str(STEPS))
    wait_for_steps(first, 2)
    arguments = (tmp_path / "arguments.txt").read_bytes()
    second = start(data, tmp_path, 1, "--train-iters", "3")
    output = second.communicate(timeout=60)[0].decode()
    assert second.returncode == 2, output
    assert f"error: --out {tmp_path} is being written by another run. Remedy: " in output
    assert (tmp_path / "arguments.txt").read_bytes() == arguments
    first.kill()
    first.communicate(timeout=60)
