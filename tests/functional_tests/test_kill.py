"""After kill -9 of a rank, its launcher or the shell nothing of the run lives.

python -m tests.functional_tests.test_kill      # all of them, 15 minutes
"""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional_tests.launch import SMALL, environment, only_in_all

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VICTIMS = ("rank", "launcher", "shell")
MOMENTS = ("start", "step", "save", "async save")
# tests/unit_tests/process/test_helpers.py kills shells too.
SAMPLE = [("rank", "async save", 1), ("launcher", "step", 2)]
SAMPLE += [pytest.param("shell", "save", 1, marks=only_in_all)]
SECONDS_TO_BEGIN, SECONDS_TO_END = 240.0, 10.0
# The end of the shell is that of a terminal: the run saves first.  For an asynchronous save every
# rank starts a helper process that imports torch (four of them take 18 s on two cores).
SECONDS_TO_SAVE_AND_END = 60.0
_MARK = "TRINITY_TEST_RUN"


def living(mark: str) -> dict[int, str]:
    """Command lines of the processes of a run, by id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            variables = (path / "environ").read_bytes()
            if state != "Z" and f"{_MARK}={mark}".encode() in variables:
                found[int(path.name)] = (
                    (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                )
        except OSError:
            continue
    return found


def wait_for(what: Callable[[], object], seconds: float, pause: float = 0.005) -> bool:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def rank_of(mark: str) -> int:
    """The process of the last rank; those that it forks have its command line and a later id."""
    ranks: dict[int, int] = {}
    for pid, line in sorted(living(mark).items()):
        if "-m trinity_megatron.training" in line:
            ranks.setdefault(int(variables_of(pid).get(b"RANK", b"-1")), pid)
    return ranks[max(ranks)]


def variables_of(pid: int) -> dict[bytes, bytes]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def kill(victim: str, moment: str, ranks: int, data: Path, folder: Path) -> list[str]:
    """Start a run, kill a part of it and say what is left of the run 10 s later.

    Args:
        victim: Of ``VICTIMS``.
        moment: Of ``MOMENTS``.
        ranks: Number of ranks.
        data: Prepared data.
        folder: Empty, with a short path; gets the run and its temporary files.
    """
    mark, out, temporary = uuid.uuid4().hex, folder / "run", folder / "tmp"
    temporary.mkdir(parents=True)
    flags = [*SMALL, "--data", str(data), "--out", str(out), "--nproc", str(ranks)]
    flags += ["--train-iters", "5000", "--save-interval", "3" if "save" in moment else "10000"]
    flags += ["--async-save"] if moment == "async save" else []
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", *flags]
    if victim == "shell":  # it waits, as a script's does, for a command that is not its last one
        command = ["sh", "-c", f"{shlex.join(command)}; true"]
    variables = {**environment(), _MARK: mark, "TMPDIR": str(temporary)}
    variables.pop("TORCHINDUCTOR_CACHE_DIR", None)  # that of the tests themselves
    before = shared_memory()
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
    try:
        assert wait_for(lambda: has_come(moment, out, folder / "log", mark), SECONDS_TO_BEGIN), (
            folder / "log"
        ).read_text()[-3000:]
        os.kill(rank_of(mark) if victim == "rank" else run.pid, signal.SIGKILL)
        patience = SECONDS_TO_SAVE_AND_END if victim == "shell" else SECONDS_TO_END
        wait_for(lambda: not living(mark) and run.poll() is not None, patience, 0.1)
        left = [f"process {line}" for line in living(mark).values()]
        left += [f"file {path}" for path in temporary.iterdir()]
        return left + [f"shared memory {name}" for name in shared_memory() - before]
    finally:
        for pid in living(mark):
            os.kill(pid, signal.SIGKILL)
        run.wait()


def has_come(moment: str, out: Path, log: Path, mark: str) -> bool:
    """Whether a run has come to the moment at which it is killed."""
    if moment == "start":  # the ranks import
        lines = living(mark).values()
        return any("-m trinity_megatron.training" in line for line in lines)
    if moment == "step":
        return re.search(r"step +3/", log.read_text()) is not None
    # The second save has begun.
    return (out / "checkpoints" / "iter_0000006").is_dir()


@pytest.mark.parametrize(("victim", "moment", "ranks"), SAMPLE)
def test_nothing_is_left(victim: str, moment: str, ranks: int, data: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        left = kill(victim, moment, ranks, data, Path(folder))
    assert not [line for line in left if not line.startswith("shared memory")], left


def main() -> None:
    """Kill each victim at each moment, with one rank and with four."""
    from trinity_megatron.data.prepare import prepare_data

    failures = 0
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        sources = sorted(Path(os.__file__).parent.glob("[a-f]*.py"))[:36]
        prepare_data(Path(name, "data"), sources, vocab_size=512)
        ways = itertools.product((1, 4), MOMENTS, VICTIMS)
        for number, (ranks, moment, victim) in enumerate(ways):
            left = kill(victim, moment, ranks, Path(name, "data"), Path(name, str(number)))
            failures += bool(left)
            said = left or "nothing is left"
            print(f"{ranks} ranks, kill -9 of the {victim}, {moment}: {said}", flush=True)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
