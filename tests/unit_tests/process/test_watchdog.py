"""A rank that does not move says so, and is ended where nothing else would end it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.alarm_receiver import receiving
from trinity_megatron.process.alarms import VARIABLE

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from trinity_megatron.process.alarms import Alarms, read_webhook
from trinity_megatron.process.watchdog import Watchdog

folder, seconds, end_after, what = Path(sys.argv[1]), *map(float, sys.argv[2:4]), sys.argv[4]
alarms = Alarms(read_webhook(), run="tiny", rank=0, step=lambda: 3)
dog = Watchdog(0, 1, folder, seconds=seconds, end_after=lambda: end_after, alarms=alarms)
dog.start()
dog.beat("in step 3")
print("begun", flush=True)

def read_batch(duration):
    time.sleep(duration)

def compute(duration):
    end = time.monotonic() + duration
    while time.monotonic() < end:
        sum(range(10000))

def block_interpreter(duration):
    ctypes.PyDLL(None).usleep(int(duration * 1e6))

if what == "beats":
    for _ in range(40):
        time.sleep(0.1)
        dog.beat()
else:
    kind, duration = what.split(":")
    globals()[kind](float(duration))
    dog.beat("in step 4")
    time.sleep(0.5)
dog.stop()
"""


def start(folder: Path, seconds: float, end_after: float, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(seconds), str(end_after), what]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def test_a_hang_is_named_with_stacks_and_its_end_is_said(tmp_path: Path) -> None:
    process = start(tmp_path, 1.0, 60.0, "read_batch:2.5")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    first, *rest = error.splitlines()
    assert first.startswith("rank 0 hangs: nothing has happened for 1 s in step 3; it is in ")
    assert first.endswith(f"Stacks of all ranks: {tmp_path}") and " read_batch, <string>:" in first
    assert rest[-1].startswith("> the run goes on after ")
    assert "in read_batch" in (tmp_path / "rank_00000.txt").read_text()
    assert not (tmp_path / "rank_00000.json").exists()


def test_it_is_ended_only_where_it_does_nothing(tmp_path: Path) -> None:
    dead = start(tmp_path, 1.0, 1.0, "read_batch:60")
    error = dead.communicate(timeout=50)[1]
    assert dead.returncode == 1
    assert "error: rank 0 has not moved for 2 s in step 3, in read_batch, <string>:" in error
    assert "--distributed-timeout-minutes" in error
    busy = start(tmp_path, 1.0, 1.0, "compute:4")
    error = busy.communicate(timeout=60)[1]
    assert busy.returncode == 0 and "it is in compute, <string>:" in error


def test_what_beats_is_left_alone(tmp_path: Path) -> None:
    process = start(tmp_path, 2.0, 2.0, "beats")
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_stacks_come_from_a_rank_whose_interpreter_is_blocked(tmp_path: Path) -> None:
    process = start(tmp_path, 1.0, 60.0, "block_interpreter:4")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "in block_interpreter" in error


@pytest.mark.skipif(sys.platform != "linux", reason="job control of Linux")
def test_a_process_that_was_suspended_does_not_hang(tmp_path: Path) -> None:
    process = start(tmp_path, 4.0, 4.0, "read_batch:9")
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "hangs" not in error


def test_a_hang_is_an_alarm_and_so_is_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        monkeypatch.setenv(VARIABLE, receiver.url)
        process = start(tmp_path, 1.0, 1.0, "read_batch:60")
        process.communicate(timeout=60)
    assert process.returncode == 1
    first, *_, last = receiver.alarms
    assert first["text"].startswith("tiny, step 3: rank 0 hangs: nothing has happened for ")
    assert "rank 0 has not moved for " in last["text"] and "it is ended" in last["text"]
    assert {alarm["kind"] for alarm in receiver.alarms} == {"hang"}
