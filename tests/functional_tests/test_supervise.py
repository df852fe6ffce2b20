"""A supervised run with faults ends by itself, with the losses of the undisturbed run.

python -m pytest tests/functional_tests/test_supervise.py with TRINITY_TESTS=all; three minutes.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.functional_tests.launch import SMALL, environment, only_in_all
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG, RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow, only_in_all]

STEPS, INTERVAL = 30, 4
# At the beginning of a step, once: step, rank and what happens.
FAULTS = (
    (6, 1, "SIGKILL"),
    (11, 0, "exception"),
    (18, 1, "damage"),
    (23, 0, "SIGTERM"),
    (26, 1, "flip"),
)
# Python imports it in every process; only ranks look for faults.
CUSTOMIZE = """
import importlib.abc, os, sys

FOLDER = os.environ.get("TRINITY_TEST_FAULTS")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "trinity_megatron.training.pretrain" and "RANK" in os.environ:
            sys.meta_path.remove(self)
            import faults
            faults.install()
        return None

if FOLDER:
    sys.meta_path.insert(0, Finder())
"""
PROGRAM = """
import functools, json, os, signal
from pathlib import Path

FOLDER = Path(os.environ["TRINITY_TEST_FAULTS"])

def install():
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
    enter_host()
    from megatron.training import get_args, training
    train_step = training.train_step

    @functools.wraps(train_step)
    def with_faults(*args, **kwargs):
        for step, rank, kind in json.loads((FOLDER / "faults.json").read_text()):
            done = FOLDER / f"{step}.done"
            if get_args().curr_iteration + 1 == step and get_args().rank == rank:
                if not done.exists():
                    done.touch()
                    break_it(kind, Path(get_args().save), args[2])
        return train_step(*args, **kwargs)

    training.train_step = with_faults

def break_it(kind, checkpoints, model):
    if kind == "flip":
        bias = next(b for n, b in model[0].named_parameters() if n.endswith("expert_bias"))
        bits = bias.detach()[:1].view(__import__("torch").int32)
        bits ^= 1 << 20
        return
    if kind == "exception":
        raise RuntimeError("an exception of the test")
    if kind == "damage":
        newest = max(checkpoints.glob("iter_*"))
        shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        kind = "SIGKILL"
    os.kill(os.getpid(), signal.Signals[kind])
"""


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("supervised")
    (folder / "sitecustomize.py").write_text(CUSTOMIZE)
    (folder / "faults.py").write_text(PROGRAM)
    (folder / "faults.json").write_text(json.dumps(FAULTS))
    command = [sys.executable, "-m", "trinity_megatron.cli"]
    flags = [*SMALL, "--train-iters", str(STEPS), "--save-interval", str(INTERVAL)]
    flags += ["--num-layers", "3", "--expert-model-parallel-size", "2", "--keep-last", "3"]
    flags += ["--use-distributed-optimizer", "--check-replicas", "1"]

    def train(out: str, *before: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = ["train", "--data", str(data), "--out", str(folder / out), "--nproc", "2", *flags]
        return subprocess.run(
            [*command, *before, *own],
            env={**environment(), **variables},
            capture_output=True,
            text=True,
            timeout=900,
        )

    undisturbed = train("undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    path = f"{folder}:{environment()['PYTHONPATH']}"
    supervised = train(
        "run",
        "supervise",
        "--wait",
        "0.1",
        "--",
        TRINITY_TEST_FAULTS=str(folder),
        PYTHONPATH=path,
    )
    return SimpleNamespace(folder=folder, result=supervised)


def test_it_ends_by_itself_and_says_how(runs: SimpleNamespace) -> None:
    assert runs.result.returncode == 0, runs.result.stderr[-4000:]
    log = (runs.folder / "run" / "supervise.log").read_text().splitlines()
    print("\n".join(log))
    assert len(log) == len(FAULTS) + 1
    for line, (step, _, kind) in zip(log, FAULTS, strict=False):
        assert f"in step {step} " in line or kind == "SIGTERM"
    starts = ("the beginning", "step 4", "step 8", "step 12", "step 23", "step 24")
    for number, (line, start) in enumerate(zip(log, starts, strict=True), start=1):
        assert f"start {number} from {start} has" in line
    assert "rank 1 was killed by SIGKILL. Step 4 is saved" in log[0]
    assert "RuntimeError: an exception of the test. Step 8" in log[1]
    assert "rank 1 was killed by SIGKILL. Step 16" in log[2]  # which is damaged
    assert "SIGTERM" in log[3] and "Step 23 is saved" in log[3]  # after the step
    assert "expert_bias on ranks 0, 1. A device" in log[4]
    assert "has completed the run" in log[5]
    # It was the checkpoint of step 16.
    assert (runs.folder / "run" / "checkpoints" / "damaged_iter_0000016").is_dir()
    assert "goes on from step 12" in runs.result.stderr
    assert json.loads((runs.folder / "run" / "heartbeat.json").read_text())["saved"] == STEPS


def test_the_losses_are_those_of_the_undisturbed_run(runs: SimpleNamespace) -> None:
    found, expected = (
        RunLog(runs.folder / name / "tensorboard") for name in ("run", "undisturbed")
    )
    for tag in ("lm loss", "grad-norm", "learning-rate", "lm loss validation"):
        assert found.scalars(tag) == expected.scalars(tag), tag
    assert list(found.scalars("lm loss")) == list(range(1, STEPS + 1))
    for tag in (TOKENS_TAG, BIAS_TAG):
        a, b = found.tensors(tag), expected.tensors(tag)
        assert list(a) == list(b) and all(np.array_equal(a[step], b[step]) for step in a), tag
