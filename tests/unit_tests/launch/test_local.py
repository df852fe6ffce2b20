"""The launcher: what ranks are started with, and that none of them outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trinity_megatron.launch import local
from trinity_megatron.process import rank

ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 60.0  # seconds; generous, for machines that are busy with something else

# Stands in for the training module: says who it is, then does what its arguments say.
RANK = """
import os, sys, time
from pathlib import Path
from trinity_megatron.process.rank import enter_rank
enter_rank()
folder, rank, action = Path(sys.argv[1]), os.environ["RANK"], sys.argv[2]
port = os.environ["MASTER_PORT"]
if action == "port":
    (folder / rank).write_text(port + " none")
elif action == "reduce":
    import torch
    torch.distributed.init_process_group("gloo")
    total = torch.tensor([float(rank) + 1])
    torch.distributed.all_reduce(total)
    (folder / rank).write_text(f"{port} {total.item()}")
    torch.distributed.destroy_process_group()
else:
    (folder / f".{rank}").write_text(str(os.getpid()))
    (folder / f".{rank}").rename(folder / rank)
    if action == "fail" and rank == "1":
        while not (folder / "0").exists():  # or the launcher may stop it before it says who it is
            time.sleep(0.01)
        print("error: what went wrong", file=sys.stderr)
        sys.exit(7)
    time.sleep(300)
"""


@pytest.fixture
def rank_module(tmp_path: Path) -> Path:
    path = tmp_path / "modules" / "dummy_rank.py"
    path.parent.mkdir()
    path.write_text(RANK)
    return path


def start(rank_module: Path, folder: Path, action: str, num_ranks: int = 2) -> subprocess.Popen:
    """Start a launcher of ``num_ranks`` dummy ranks, which write to ``folder``."""
    folder.mkdir()
    code = (
        "import sys\n"
        "from trinity_megatron.launch.local import launch\n"
        f"sys.exit(launch(sys.argv[1:], num_ranks={num_ranks}, module={rank_module.stem!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{rank_module.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), action],
        env=environment,
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_pids(folder: Path, num_ranks: int = 2) -> list[int]:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        files = [folder / str(rank) for rank in range(num_ranks)]
        if all(file.exists() for file in files):
            return [int(file.read_text()) for file in files]
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # ended between the two lines
        return False


def assert_gone(pids: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, f"ranks {[p for p in pids if is_alive(p)]} outlived"
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("signum", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
)
def test_no_rank_outlives_the_launcher(
    rank_module: Path, tmp_path: Path, signum: signal.Signals, exit_code: int
) -> None:
    running = start(rank_module, tmp_path / "run", "sleep")
    pids = wait_for_pids(tmp_path / "run")
    running.send_signal(signum)
    assert running.wait(DEADLINE) == exit_code
    assert_gone(pids, seconds=5)
    assert running.communicate()[1] == ""


@pytest.mark.distributed
def test_exit_code_and_message_of_a_failing_rank(rank_module: Path, tmp_path: Path) -> None:
    running = start(rank_module, tmp_path / "run", "fail")
    pids = wait_for_pids(tmp_path / "run")
    _, errors = running.communicate(timeout=DEADLINE)
    assert running.returncode == 7
    assert_gone(pids, seconds=5)
    # Its own message, then one line of ours; nothing of torchrun.
    first, second = errors.splitlines()
    assert first == "error: what went wrong"
    assert second.startswith("trinity-megatron: rank 1 ended with exit code 7")


@pytest.mark.distributed
def test_runs_at_once_do_not_meet(rank_module: Path, tmp_path: Path) -> None:
    requests = [("reduce", 1), ("reduce", 2), ("port", 2)]
    folders = [tmp_path / f"run{number}" for number in range(len(requests))]
    runs = [
        start(rank_module, folder, action, num_ranks)
        for folder, (action, num_ranks) in zip(folders, requests, strict=True)
    ]
    for running in runs:
        _, errors = running.communicate(timeout=DEADLINE)
        assert running.returncode == 0, errors
    outputs = [[file.read_text().split() for file in folder.iterdir()] for folder in folders]
    ports = [{port for port, _ in ranks} for ranks in outputs]
    assert all(len(found) == 1 for found in ports)  # one per run
    assert len(set.union(*ports)) == len(runs)
    assert [total for _, total in outputs[0]] == ["1.0"]
    assert [total for _, total in outputs[1]] == ["3.0", "3.0"]


def test_rank_that_starts_after_its_launcher_ended_ends_too() -> None:
    code = "from trinity_megatron.process.rank import die_with_parent as die; die(); print('alive')"
    base = {**os.environ, "PYTHONPATH": str(ROOT)}
    orphan = {"TORCHELASTIC_RUN_ID": "x", rank.LAUNCHER_PID_VARIABLE: str(os.getpid() + 1)}
    for environment, expected in [(base, 0), ({**base, **orphan}, -signal.SIGKILL)]:
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL
        )
        assert result.returncode == expected


@pytest.mark.parametrize(
    ("nproc", "num_devices", "expected"), [(None, 0, 1), (None, 8, 8), (4, 0, 4), (4, 8, 4)]
)
def test_number_of_ranks(nproc: int | None, num_devices: int, expected: int) -> None:
    assert local.choose_num_ranks(nproc, num_devices) == expected


@pytest.mark.parametrize(("nproc", "num_devices"), [(0, 0), (-2, 4), (9, 8)])
def test_impossible_number_of_ranks_is_refused(nproc: int, num_devices: int) -> None:
    with pytest.raises(ValueError, match=rf"--nproc {nproc} .*Remedy: "):
        local.choose_num_ranks(nproc, num_devices)


def test_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"--out .*is a file.*Remedy: "):
            local.check_out(str(tmp_path / out))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"--out .*link to nowhere.*Remedy: "):
        local.check_out(str(tmp_path / "link"))


def test_presets_accepted_without_a_look_exist() -> None:
    from trinity_megatron.model.presets import PRESETS

    assert set(local._RELEASED_PRESETS) <= set(PRESETS)


def test_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'huge'.*Remedy.*tiny"):
        local.check_preset("huge")
