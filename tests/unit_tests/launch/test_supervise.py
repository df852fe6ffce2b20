"""What is started again, from where, and when it is given up; the runs are small programs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.alarm_receiver import TOKEN, receiving
from trinity_megatron.cli.supervise import make_command
from trinity_megatron.errors import UserError
from trinity_megatron.launch.supervise import find_reason
from trinity_megatron.process.alarms import VARIABLE

ROOT = Path(__file__).resolve().parents[3]
# Does what the next line of plan.json says: step, last save, lines of its error output, its end.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from trinity_megatron.process.heartbeat import HeartbeatFile

out = Path(sys.argv[2])
count = out / "count"
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
step, saved, words, end = json.loads((out / "plan.json").read_text())[number]
if step is not None:
    HeartbeatFile(out).write(start=saved - 5, step=step, saved=saved)
print(words, file=sys.stderr, flush=True)
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (out / "waits").touch()
    time.sleep(30)
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def start(folder: Path, plan: list[list[object]], *flags: str) -> subprocess.Popen[str]:
    out = folder / "run"
    out.mkdir()
    (out / "plan.json").write_text(json.dumps(plan))
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "trinity_megatron.cli", "supervise", "--wait", "0.01", *flags]
    command += ["--", sys.executable, str(folder / "program.py"), "--out", str(out)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def story(folder: Path) -> list[str]:
    """Lines of the log without the date."""
    return [line[20:] for line in (folder / "run" / "supervise.log").read_text().splitlines()]


def test_it_tells_its_story(tmp_path: Path) -> None:
    plan = [
        [7, 5, "", -9],
        [None, 5, "ModuleNotFoundError: No module named 'gone'", 1],
        [13, 10, "Traceback (most recent call last):\nRuntimeError: NCCL error\nmore", 1],
        [20, 20, "", -15],
        [30, 30, "", 0],
    ]
    process = start(tmp_path, plan)
    assert process.wait(timeout=60) == 0
    lines = story(tmp_path)
    words = (
        r"start 1 from the beginning has failed in step 7 after \d+ s: ended by SIGKILL. Step 5 is "
        "saved; start 2 in 0 s",
        "start 2 has failed before its first step .*: ModuleNotFoundError: .*. Step 5 is saved; .*",
        "start 3 from step 5 has failed in step 13 .*: RuntimeError: NCCL error. Step 10 is .*",
        "start 4 from step 15 has failed in step 20 .*: ended by SIGTERM. Step 20 is saved; .*",
        r"start 5 from step 25 has completed the run after \d+ s",
    )
    assert len(lines) == len(words)
    for line, pattern in zip(lines, words, strict=True):
        assert re.fullmatch(pattern, line), line


def test_an_error_of_the_user_is_not_repeated(tmp_path: Path) -> None:
    plan = [[None, 0, "error: --lr -1 is out of range. Remedy: give 0.", 2]]
    assert start(tmp_path, plan).wait(timeout=60) == 2
    (line,) = story(tmp_path)
    assert "error: --lr -1 is out of range. Remedy: give 0. Not started again: what it says" in line


def test_a_failure_that_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another step or a new checkpoint in between begins the count anew.
    failures = [[8, 5, "", 1], [9, 5, "", 1], [9, 5, "", 1], [9, 8, "", 1], [9, 8, "", 1]]
    plan = [*failures, [9, 8, "ValueError: token 7", 1]]
    with receiving() as receiver:
        monkeypatch.setitem(ENVIRONMENT, VARIABLE, receiver.url)
        assert start(tmp_path, plan).wait(timeout=60) == 1
    lines = story(tmp_path)
    assert len(lines) == len(plan)
    assert lines[-1].endswith(
        "ValueError: token 7. Not started again: it has failed 3 times in a row in step 9"
    )
    (alarm,) = receiver.alarms
    assert alarm["kind"] == "given up" and alarm["text"] == f"run: {lines[-1]}"
    assert alarm["rank"] is None


def test_what_is_no_webhook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, VARIABLE, f"hooks.example/{TOKEN}")
    process = start(tmp_path, [])
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and f"error: {VARIABLE} is no address of http" in error
    assert TOKEN not in error and not (tmp_path / "run" / "count").exists()


def test_failures_without_a_checkpoint(tmp_path: Path) -> None:
    plan = [[step, 5, "", 1] for step in (6, 7, 8, 6, 7, 8)]
    assert start(tmp_path, plan, "--max-failures", "2").wait(timeout=60) == 1
    assert "has failed 6 times without a new checkpoint" in story(tmp_path)[-1]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_its_own_end(signum: int, tmp_path: Path) -> None:
    process = start(tmp_path, [[4, 3, "", "wait"]])  # type: ignore[list-item]
    end = time.monotonic() + 30
    while not (tmp_path / "run" / "waits").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signum)
    # The error output is the run's too: it has ended when that has.
    process.communicate(timeout=20)
    assert process.returncode == (143 if signum == signal.SIGTERM else -signum)
    if signum == signal.SIGTERM:
        assert story(tmp_path)[-1].endswith("Ended by SIGTERM")


def test_the_telling_line() -> None:
    lost = "[rank0]: RuntimeError: Connection reset by peer"
    own = "[rank1]: torch.Error: x"
    trace = ["Traceback (most recent call last):", '  File "a.py", line 1', lost, own, "y"]
    first = "trinity-megatron: rank 1 ended with exit code 1; its message is above."
    killed = "trinity-megatron: rank 1 was killed by SIGKILL, as happens when memory runs out."
    assert find_reason([*trace, first], 1) == own
    assert find_reason(trace, 1) == lost
    assert find_reason([*trace, killed], 137) == "rank 1 was killed by SIGKILL"
    assert find_reason(["[rank 3] error: no.", *trace], 1) == "[rank 3] error: no."
    assert find_reason([first], 1) == first.removeprefix("trinity-megatron: ")
    assert find_reason([], 139) == "ended by SIGSEGV" and find_reason([], 7) == "exit code 7"
    hang = "rank 2 hangs: nothing has happened for 150 s in step 3; it is in f, x.py:1"
    late = "[rank0]: RuntimeError: Timed out waiting 600000ms for recv operation to complete"
    assert find_reason([hang, late, first], 1) == hang
    assert find_reason([hang.replace("rank 2 hangs", "ranks 2, 3 hang"), late], 1) != late
    assert find_reason([hang, "> the run goes on after 170 s", own], 1) == own
    assert find_reason([hang, "error: --data is missing."], 2) == "error: --data is missing."
    assert len(find_reason(["ValueError: " + "x" * 1000], 1)) < 250


def test_the_command() -> None:
    train = ["train", "--data", "D", "--out", "O"]
    command, out = make_command(train)
    assert out == "O"
    assert command[1:] == ["-m", "trinity_megatron.cli", *train, "--on-damage", "previous"]
    assert make_command([*train, "--on-damage", "fail"])[0][-2:] == ["--on-damage", "fail"]
    other = ["srun", "python", "pretrain.py", "--out", "O"]
    assert make_command(other) == (other, "O")
    for bad in ([], ["train", "--data", "D"]):
        with pytest.raises(UserError, match="supervise needs a command"):
            make_command(bad)


@pytest.mark.parametrize(
    "flags",
    [["--no-verify-checksums"], ["--non-persistent-ckpt-type=global"], ["--ckpt-format", "torch"]],
)
def test_flags_that_go_back_to_nothing(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    given = ["train", "--data", "D", "--out", "O", *flags]
    assert make_command(given)[0][3:] == given  # else every start would be refused
    assert f"with {' '.join(flags).replace('=', ' ')} a damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ["--load X", "--ckpt-step 8", "--finetune", "--save X", "--load X --save Y"],
)
@pytest.mark.parametrize("program", [["train"], ["srun", "python", "pretrain.py"]])
def test_every_start_from_the_same_step(program: list[str], flags: str) -> None:
    first = " ".join(flags.split()[:2])
    with pytest.raises(UserError, match=f"supervise with {first}( without --load)?: each start"):
        make_command([*program, "--data", "D", "--out", "O", *flags.split()])


@pytest.mark.parametrize("flags", ["--load O/checkpoints", "--load X --save ./X"])
def test_the_run_s_own_folder(flags: str) -> None:
    command, _ = make_command(["train", "--data", "D", "--out", "O", *flags.split()])
    assert command[-2:] == ["--on-damage", "previous"] and flags.split()[1] in command


def test_a_task_of_srun_that_refuses(tmp_path: Path) -> None:
    words = (
        "error: --lr -1 is out of range.\nsrun: error: node7: task 3: Exited with exit code 2\n"
        "srun: error: node7: tasks 0-2: Terminated"
    )
    assert start(tmp_path, [[None, 0, words, 143]]).wait(timeout=60) == 2
    assert "Not started again: what it says has to be mended" in story(tmp_path)[-1]


def test_going_back_is_no_progress(tmp_path: Path) -> None:
    # Step 20 is saved again and again, and was damaged each time.
    plan = [[step, saved, "", 1] for step, saved in ((25, 20), (12, 10)) * 3]
    assert start(tmp_path, plan, "--max-failures", "2").wait(timeout=60) == 1
    lines = story(tmp_path)
    assert len(lines) == 6
    assert lines[-1].endswith("it has failed 6 times without a new checkpoint")


def test_nobody_reads_its_error_output(tmp_path: Path) -> None:
    # More than a pipe holds: the run must not wait for a terminal that was closed.
    process = start(tmp_path, [[9, 5, "x" * 200_000, 1], [20, 20, "", 0]])
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert [line.partition(" after")[0] for line in story(tmp_path)] == [
        "start 1 from the beginning has failed in step 9",
        "start 2 from step 15 has completed the run",
    ]
