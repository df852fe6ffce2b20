"""The batch script under a real Slurm: preempted and killed, a run ends where another one ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.launch import NARROW, ROOT, environment, only_in_all
from tests.functional_tests.slurm import Slurm, logs_of, one_node, wait_for, why_not
from trinity_megatron.telemetry.tensorboard_log import RunLog

pytestmark = [pytest.mark.slow, pytest.mark.distributed, only_in_all]

SCRIPTS = ROOT / "examples" / "trinity_tiny"
STEPS = 160
PATIENCE = 900.0  # seconds, of a busy machine
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
FLAGS = (
    "--seq-length 64 --max-position-embeddings 64 --window-size 15,0 --log-interval 1 "
    "--tensorboard-log-interval 1 --eval-iters 0 --save-interval 20 --keep-last 2 --seed 11"
).split() + list(NARROW)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """A Slurm of one node with two cores."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path / "slurm"
    folder.mkdir()
    with one_node(folder) as running:
        yield running


def variables(data: Path, out: Path) -> dict[str, str]:
    """For the scripts of the example."""
    named = {"DATA": str(data), "OUT": str(out), "PYTHON": sys.executable}
    return {**environment(), **named, "TRAIN_ITERS": str(STEPS)}


def steps_of(out: Path) -> dict[int, float]:
    """Loss of each step so far."""
    folder = out / "tensorboard"
    return RunLog(folder).scalars("lm loss") if folder.is_dir() else {}


def saved(out: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    file = out / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(file.read_text()) if file.exists() else 0


def ranks_of(out: Path) -> dict[int, int]:
    """Rank -> process of the training that writes to a folder."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            entries = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = any(word.endswith(b"pretrain_trinity.py") for word in words)
        if is_rank and str(out).encode() in words and words[0].endswith(b"python"):
            named = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
            found[int(named[b"SLURM_PROCID"])] = int(folder.name)
    return found


def test_preempted_and_killed_it_ends_where_another_ends(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    subprocess.run(
        ["bash", str(SCRIPTS / "03_train_torchrun.sh"), *FLAGS],
        env=variables(data, plain),
        check=True,
        capture_output=True,
    )
    job = slurm.submit(
        ROOT,
        f"--output={tmp_path}/job.log",
        str(SCRIPTS / "03_train_slurm.sh"),
        *FLAGS,
        **variables(data, out),
    )

    def explain() -> str:
        texts = [path.read_text()[-3000:] for path in (tmp_path / "job.log",) if path.exists()]
        texts += [
            path.read_text()[-2000:] for path in sorted((tmp_path / "out-slurm").glob("slurm-*"))
        ]
        shown = slurm.call("scontrol", "show", "job", job)
        return "\n".join([*texts, shown, logs_of(tmp_path / "slurm")])

    wait_for(lambda: saved(out) >= 20, PATIENCE, explain)
    other = slurm.submit(tmp_path, "-p", "high", "-n2", "--output=other.log", "--wrap", "hostname")
    wait_for(lambda: slurm.field(other, "JobState") == "COMPLETED", PATIENCE, explain)
    preempted = saved(out)
    assert 20 <= preempted < STEPS and preempted % 20, "it did not save when it was preempted"
    assert len(steps_of(out)) == preempted

    wait_for(lambda: saved(out) > preempted and len(ranks_of(out)) == 2, PATIENCE, explain)
    assert slurm.field(job, "Restarts") == "1"
    os.kill(ranks_of(out)[1], signal.SIGKILL)
    wait_for(lambda: slurm.field(job, "Restarts") == "2", PATIENCE, explain)
    assert saved(out) < STEPS, "it was killed after its end"

    wait_for(lambda: slurm.field(job, "JobState") in ENDED, PATIENCE, explain)
    assert slurm.field(job, "JobState") == "COMPLETED", explain()
    losses = steps_of(out)
    assert losses == steps_of(plain) and len(losses) == STEPS
    log = (tmp_path / "job.log").read_text()
    assert "restart 0: ended on SIGTERM" in log and "restart 2: the run has ended" in log
    assert re.search(r"restart 1: (ended on SIGTERM|failed with code 137)", log)
    assert list((tmp_path / "out-slurm").glob(f"slurm-{job}-*.log"))


def test_what_is_wrong_with_the_flags_is_not_tried_again(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    script = str(SCRIPTS / "03_train_slurm.sh")
    words = [f"--output={tmp_path}/job.log", script, *FLAGS, "--global-batch-size", "7"]
    job = slurm.submit(ROOT, *words, **variables(data, tmp_path / "out"))
    wait_for(lambda: slurm.field(job, "JobState") in ENDED, PATIENCE, lambda: "still running")
    assert slurm.field(job, "ExitCode") == "2:0" and slurm.field(job, "Restarts") == "0"
    assert "not started again" in (tmp_path / "job.log").read_text()
    (log,) = (tmp_path / "out-slurm").glob(f"slurm-{job}-*.log")
    assert "Remedy" in log.read_text()
