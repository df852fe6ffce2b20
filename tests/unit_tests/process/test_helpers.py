"""What a rank has started ends with it, however it ends, and its temporary files are removed."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from trinity_megatron.process import helpers

ROOT = Path(__file__).resolve().parents[3]
MARK = "TRINITY_TEST_MARK"
DEADLINE = 180.0
pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are in /proc")

# Has a helper of each kind that Megatron, torch and W&B start, then does what it is told.
RANK = """
from trinity_megatron.process.rank import enter_rank
if __name__ == "__main__":
    enter_rank()
import multiprocessing, os, subprocess, sys, tempfile, time
from pathlib import Path

def wait():
    time.sleep(600)

if __name__ == "__main__":
    folder, action = Path(sys.argv[1]), sys.argv[2]
    queue = multiprocessing.get_context("spawn").Manager().Queue()
    writers = [multiprocessing.get_context(kind).Process(target=wait, daemon=True)
               for kind in ("fork", "spawn", "forkserver")]
    for writer in writers:
        writer.start()
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(tempfile.mkdtemp(), "file").write_text("something")
    queue.put(1)
    (folder / f".{os.environ['RANK']}").write_text(str(os.getpid()))
    (folder / f".{os.environ['RANK']}").rename(folder / os.environ["RANK"])
    if action == "wait":
        wait()
    elif action == "group":
        # What a terminal, timeout or a supervisor sends to all processes of a group.
        for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, lambda *_: None)
            os.killpg(0, signum)
        time.sleep(0.5)
        queue.put(2)
        assert [queue.get(), queue.get()] == [1, 2] and all(w.is_alive() for w in writers)
""".replace("import multiprocessing,", "import signal, multiprocessing,")


@pytest.fixture
def mark() -> Iterator[str]:
    """Names the processes of a test in their environment; none is left after it."""
    value = uuid.uuid4().hex
    yield value
    for pid in find(value):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder with a short path, as a socket needs it."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


def find(mark: str) -> list[int]:
    """Living processes of a test."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def names(pids: list[int]) -> list[bytes]:
    return [
        Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids if Path(f"/proc/{pid}").exists()
    ]


def assert_nothing_left(mark: str, temporary: Path, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while find(mark) or list(temporary.iterdir()):
        assert time.monotonic() < end, (names(find(mark)), list(temporary.iterdir()))
        time.sleep(0.1)


def start(
    folder: Path, temporary: Path, mark: str, action: str, num_ranks: int, *, script: str = ""
) -> subprocess.Popen:
    """Start ranks with helpers; from a script of a shell, with "$@" as the command, if given."""
    module = folder / "modules" / "rank_with_helpers.py"
    module.parent.mkdir(parents=True)
    module.write_text(RANK)
    code = (
        "import sys\n"
        "from trinity_megatron.launch.local import launch\n"
        f"sys.exit(launch(sys.argv[1:], num_ranks={num_ranks}, module={module.stem!r}))"
    )
    command = [sys.executable, "-c", code, str(folder), action]
    if script:
        command = ["bash", "-c", script, "bash", *command]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{module.parent}",
        "TMPDIR": str(temporary),
        MARK: mark,
    }
    return subprocess.Popen(
        command, env=environment, cwd=folder, start_new_session=True, preexec_fn=heed_signals
    )


def heed_signals() -> None:
    """Even if the tests run under nohup or in the background."""
    for signum in (signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)


def wait_for_ranks(running: subprocess.Popen, folder: Path, num_ranks: int) -> list[int]:
    end = time.monotonic() + DEADLINE
    files = [folder / str(rank) for rank in range(num_ranks)]
    while not all(file.exists() for file in files):
        assert time.monotonic() < end and running.poll() is None, "the ranks did not start"
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("victim", "num_ranks"),
    [("rank", 1), ("rank", 2), ("launcher", 2), ("shell", 1), ("shell", 2)],
)
def test_nothing_outlives_a_kill(
    victim: str, num_ranks: int, tmp_path: Path, temporary: Path, mark: str
) -> None:
    script = '"$@"; exit $?' if victim == "shell" else ""
    running = start(tmp_path, temporary, mark, "wait", num_ranks, script=script)
    ranks = wait_for_ranks(running, tmp_path, num_ranks)
    assert len(find(mark)) > 5 * num_ranks and list(temporary.iterdir())
    os.kill(ranks[-1] if victim == "rank" else running.pid, signal.SIGKILL)
    running.wait(DEADLINE)
    assert_nothing_left(mark, temporary)


@pytest.mark.distributed
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 1.0])
def test_nothing_outlives_a_kill_at_the_start(
    seconds: float, tmp_path: Path, temporary: Path, mark: str
) -> None:
    running = start(tmp_path, temporary, mark, "wait", 1)
    time.sleep(seconds)
    running.kill()
    running.wait(DEADLINE)
    assert_nothing_left(mark, temporary)


@pytest.mark.parametrize("action", ["end", "group"])
def test_nothing_is_left_at_a_normal_end(
    action: str, tmp_path: Path, temporary: Path, mark: str
) -> None:
    running = start(tmp_path, temporary, mark, action, 1)
    assert running.wait(DEADLINE) == 0
    assert not list(temporary.iterdir())  # at once: nothing is waited for
    assert_nothing_left(mark, temporary)


@pytest.mark.parametrize("prefix", ["", "nohup ", "setsid -w "], ids=["&", "nohup", "setsid"])
def test_run_in_the_background_outlives_its_shell(
    prefix: str, tmp_path: Path, temporary: Path, mark: str
) -> None:
    script = f'{prefix}"$@"' + (" & wait" if not prefix else "; exit $?")
    shell = start(tmp_path, temporary, mark, "wait", 1, script=script)
    (rank,) = wait_for_ranks(shell, tmp_path, 1)
    shell.kill()
    shell.wait(DEADLINE)
    time.sleep(1)
    assert rank in find(mark)
    os.kill(rank, signal.SIGKILL)
    assert_nothing_left(mark, temporary)


def test_folders_of_killed_ranks_are_removed_by_the_next(temporary: Path) -> None:
    folders = [temporary / f"trinity_megatron_{name}" for name in ("a", "b", "c", "d")]
    for folder in folders:
        folder.mkdir()
    alive, elsewhere, other, dead = folders
    (dead / ".rank").write_text(os.uname().nodename)
    (elsewhere / ".rank").write_text("another-machine")
    helpers._lock_folder(str(alive))
    helpers._remove_leftovers(str(temporary))
    assert sorted(temporary.iterdir()) == [alive, elsewhere, other]
