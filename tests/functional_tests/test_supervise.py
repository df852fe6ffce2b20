"""A supervised run with ten faults ends by itself, with the losses of the undisturbed run.

With TRINITY_TESTS=all, five minutes.  TRINITY_FAULTS_SEED draws other steps and another order.
"""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.functional_tests.launch import SMALL, environment, only_in_all
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG, RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow, only_in_all]

STEPS, INTERVAL = 200, 5
KINDS = (
    "SIGKILL",
    "SIGKILL of all",
    "hang",
    "exception",
    "full disk",
    "damage",
    "SIGTERM",
    "flip",
    "SIGKILL",
    "exception",
)
HANG_SECONDS = 20


@dataclass(frozen=True)
class Fault:
    """What happens at the beginning of a step (1-based) on a rank, once."""

    step: int
    rank: int
    kind: str


def draw_faults(seed: int) -> list[Fault]:
    """Ten faults in random steps and an order by chance, in the order of their steps."""
    generator = random.Random(seed)
    steps = sorted(generator.sample(range(3 * INTERVAL + 2, STEPS), len(KINDS)))
    kinds = generator.sample(KINDS, len(KINDS))
    return [Fault(n, generator.randrange(2), k) for n, k in zip(steps, kinds, strict=True)]


def follow(faults: Sequence[Fault]) -> list[tuple[int, Fault | None]]:
    """The step that each start goes on from, and the fault that it ends by."""
    starts: list[tuple[int, Fault | None]] = []
    saved, start = [0], 0
    disk = next(fault.step for fault in faults if fault.kind == "full disk")
    for fault in (*faults, None):
        if fault is not None and fault.kind == "full disk":
            continue
        last = STEPS if fault is None else fault.step - 1
        for step in range(start + 1, last + 1):
            if step % INTERVAL == 0 and not disk <= step < disk + INTERVAL:
                saved.append(step)
        starts.append((start, fault))
        if fault is not None and fault.kind == "SIGTERM":  # it saves after the step
            saved.append(fault.step)
        if fault is not None and fault.kind == "damage":
            saved.remove(max(saved))
        start = max(saved)
    return starts


FAULTS = draw_faults(int(os.environ.get("TRINITY_FAULTS_SEED", "1")))
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
import functools, json, os, resource, signal, time
from pathlib import Path

FOLDER = Path(os.environ["TRINITY_TEST_FAULTS"])

def install():
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
    enter_host()
    from megatron.training import get_args, training
    train_step = training.train_step

    @functools.wraps(train_step)
    def with_faults(*args, **kwargs):
        rank, step = get_args().rank, get_args().curr_iteration + 1
        for fault in json.loads((FOLDER / "faults.json").read_text()):
            if fault["kind"] == "full disk":
                fill_disk(fault["step"] <= step < fault["step"] + fault["interval"])
            elif (step, rank) == (fault["step"], fault["rank"]):
                done = FOLDER / f"{step}.done"
                if not done.exists():
                    done.touch()
                    break_it(fault["kind"], Path(get_args().save), args[2])
        return train_step(*args, **kwargs)

    training.train_step = with_faults

def fill_disk(is_full):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if is_full else hard, hard))

def break_it(kind, checkpoints, model):
    if kind == "flip":
        bias = next(b for n, b in model[0].named_parameters() if n.endswith("expert_bias"))
        bits = bias.detach()[:1].view(__import__("torch").int32)
        bits ^= 1 << 20
        return
    if kind == "exception":
        raise RuntimeError("an exception of the test")
    if kind == "hang":
        time.sleep(10_000)
    if kind == "damage":
        newest = max(checkpoints.glob("iter_*"))
        shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        kind = "SIGKILL"
    if kind == "SIGKILL of all":  # torchrun too
        torchrun = os.getppid()
        ranks = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
        for pid in {torchrun, *map(int, ranks)} - {os.getpid()}:
            os.kill(pid, signal.SIGKILL)
        kind = "SIGKILL"
    os.kill(os.getpid(), signal.Signals[kind])
"""


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("supervised")
    (folder / "sitecustomize.py").write_text(CUSTOMIZE)
    (folder / "faults.py").write_text(PROGRAM)
    faults = [dataclasses.asdict(fault) | {"interval": INTERVAL} for fault in FAULTS]
    (folder / "faults.json").write_text(json.dumps(faults))
    command = [sys.executable, "-m", "trinity_megatron.cli"]
    flags = [*SMALL, "--train-iters", str(STEPS), "--save-interval", str(INTERVAL)]
    flags += ["--num-layers", "3", "--expert-model-parallel-size", "2", "--keep-last", "3"]
    flags += ["--use-distributed-optimizer", "--check-replicas", "1"]
    # A hang is named after the one, and ended after the other.
    flags += ["--hang-seconds", str(HANG_SECONDS), "--distributed-timeout-minutes", "1"]

    def train(out: str, *before: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = ["train", "--data", str(data), "--out", str(folder / out), "--nproc", "2", *flags]
        return subprocess.run(
            [*command, *before, *own],
            env={**environment(), **variables},
            capture_output=True,
            text=True,
            timeout=1800,
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


SAYS = {
    "SIGKILL": r"rank {rank} was killed by SIGKILL",
    "SIGKILL of all": r"killed|ended by SIGKILL",
    "hang": r"rank {rank} hangs: ",
    "exception": r"RuntimeError: an exception of the test",
    "damage": r"rank {rank} was killed by SIGKILL",
    "SIGTERM": r"SIGTERM",
    "flip": r"expert_bias on ranks 0, 1. A device",
}


def test_it_ends_by_itself_and_says_how(runs: SimpleNamespace) -> None:
    assert runs.result.returncode == 0, runs.result.stderr[-4000:]
    log = (runs.folder / "run" / "supervise.log").read_text().splitlines()
    print("\n".join(log))
    expected = follow(FAULTS)
    for number, (line, (start, fault)) in enumerate(zip(log, expected, strict=True), start=1):
        origin = f"step {start}" if start else "the beginning"
        assert f"start {number} from {origin} has" in line
        if fault is None:
            assert "has completed the run" in line
            continue
        assert f"in step {fault.step} " in line or fault.kind == "SIGTERM"
        assert re.search(SAYS[fault.kind].format(rank=fault.rank), line), line
    disk = next(fault.step for fault in FAULTS if fault.kind == "full disk")
    refused = -(-disk // INTERVAL) * INTERVAL
    assert f"the save of step {refused} to " in runs.result.stdout + runs.result.stderr
    assert list((runs.folder / "run" / "checkpoints").glob("damaged_iter_*"))
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
