"""Signals that ask for an end: the run saves, says so by its exit code, and goes on later."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from tests.functional_tests.launch import SMALL, environment, only_in_all
from trinity_megatron.launch.local import count_cuda_devices
from trinity_megatron.telemetry.tensorboard_log import RunLog

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(count_cuda_devices() > 0, reason="on by default without a GPU only"),
]
STEPS = 400
PATIENCE = 300.0  # seconds; for machines that are busy with something else


def train_command(data: Path, out: Path, ranks: int) -> list[str]:
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--nproc", str(ranks)]
    return [*command, *SMALL, "--data", str(data), "--out", str(out), "--save-interval", "1000"]


def start(
    data: Path, out: Path, ranks: int, *flags: str, prefix: Sequence[str] = ()
) -> subprocess.Popen:
    return subprocess.Popen(
        [*prefix, *train_command(data, out, ranks), *flags],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group, as a terminal makes one
        preexec_fn=heed_signals,
    )


def heed_signals() -> None:
    """Even if the tests run under nohup or in the background."""
    for signum in (signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)


def wait_for_steps(process: subprocess.Popen, count: int) -> None:
    """Read what the run prints until it has made so many steps."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.replace(b" ", b"").startswith(f"step{count}/".encode()):
            return
    raise AssertionError("the run has ended by itself")


@pytest.mark.parametrize(
    ("ranks", "signum", "flags", "to"),
    [
        pytest.param(1, signal.SIGTERM, "", "launcher", marks=only_in_all),
        (2, signal.SIGINT, "", "group"),
        pytest.param(
            *(2, signal.SIGUSR1, "--exit-signal SIGUSR1 --save-interval 2", "launcher"),
            marks=only_in_all,
        ),
        pytest.param(2, signal.SIGTERM, "--exit-signal SIGUSR2", "rank", marks=only_in_all),
    ],
    ids=["one-rank", "ctrl-c", "exit-signal-after-a-save", "to-one-rank-only"],
)
def test_it_saves_and_goes_on(
    ranks: int, signum: signal.Signals, flags: str, to: str, data: Path, tmp_path: Path
) -> None:
    first = start(data, tmp_path, ranks, "--train-iters", str(STEPS), *flags.split())
    wait_for_steps(first, 5)
    if to == "group":
        os.killpg(first.pid, signum)
    else:
        os.kill(first.pid if to == "launcher" else child_of(first.pid), signum)
    output = first.communicate(timeout=PATIENCE)[0].decode()
    assert first.returncode == 128 + signum, output
    reached = int((tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 5 <= reached < STEPS
    if to != "group":  # one of them goes on
        return

    # The end of the schedule stays, the run is stopped.
    second = start(
        data, tmp_path, ranks, "--train-iters", str(STEPS), "--exit-interval", str(reached + 3)
    )
    output = second.communicate(timeout=PATIENCE)[0].decode()
    assert second.returncode == 0, output
    steps = list(RunLog(tmp_path / "tensorboard").scalars("lm loss"))
    assert steps == list(range(1, reached + 4))


def child_of(launcher: int) -> int:
    """The last rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return max(map(int, children))


def test_terminal_that_closes_asks_for_a_save(data: Path, tmp_path: Path) -> None:
    """The terminal is gone before the save: nothing can be printed any more."""
    controller, terminal = os.openpty()
    command = [*train_command(data, tmp_path, 2), "--train-iters", str(STEPS)]
    code = (
        "import fcntl, os, sys, termios\n"
        "fcntl.ioctl(1, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.executable, sys.argv[1:])"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    os.close(terminal)
    output = b""
    while b" 5/" not in output.replace(b"    ", b" "):
        output += os.read(controller, 4096)
    os.close(controller)
    assert running.wait(PATIENCE) == 128 + signal.SIGHUP
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def test_reader_that_ends_too_does_not_cost_the_save(data: Path, tmp_path: Path) -> None:
    """Ctrl-C in ``trinity-megatron train | tee log`` ends tee as well."""
    running = start(data, tmp_path, 1, "--train-iters", str(STEPS))
    wait_for_steps(running, 5)
    assert running.stdout is not None
    running.send_signal(signal.SIGINT)
    running.stdout.close()
    assert running.wait(PATIENCE) == 128 + signal.SIGINT
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


@only_in_all
def test_hang_up_is_ignored_under_nohup(data: Path, tmp_path: Path) -> None:
    flags = ["--train-iters", "12", "--exit-signal", "SIGHUP"]
    running = start(data, tmp_path, 2, *flags, prefix=["nohup"])
    wait_for_steps(running, 3)
    os.killpg(running.pid, signal.SIGHUP)
    output = running.communicate(timeout=PATIENCE)[0].decode()
    assert running.returncode == 0, output
    assert " 12/" in output.replace("    ", " ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--exit-signal SIGKILL", "--exit-signal SIGKILL cannot be handled"),
        pytest.param(
            *("--exit-signal SIGSTOP", "--exit-signal SIGSTOP cannot be handled"), marks=only_in_all
        ),
    ],
)
def test_signal_that_would_not_save_is_refused(
    flags: str, words: str, data: Path, tmp_path: Path
) -> None:
    running = start(data, tmp_path, 1, *flags.split())
    output = running.communicate(timeout=PATIENCE)[0].decode()
    assert running.returncode == 2
    assert f"error: {words}" in output and "Remedy: " in output


def test_two_runs_do_not_write_one_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "arguments.txt").write_text("of the first run")
    # As the first run is writing them: a tracker file that is not there yet would be made.
    half, tracker = tmp_path / "checkpoints" / "iter_0000002", "latest_checkpointed_iteration.txt"
    half.mkdir(parents=True)
    (half.parent / tracker).write_text("2")
    with FileLock(tmp_path / ".lock"):  # as the first run holds it
        flags = ("--train-iters", "3", "--on-damage", "previous")
        second = start(data, tmp_path, 1, *flags)
        output = second.communicate(timeout=PATIENCE)[0].decode()
    assert second.returncode == 2, output
    assert f"error: --out {tmp_path} is being written by another run. Remedy: " in output
    assert (tmp_path / "arguments.txt").read_text() == "of the first run"
    assert half.exists() and (half.parent / tracker).read_text() == "2"
