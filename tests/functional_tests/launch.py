"""Start real trainings on one or more gloo ranks of this machine."""

import functools
import importlib.util
import itertools
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trinity_megatron.launch.local import count_cuda_devices
from trinity_megatron.telemetry.tensorboard_log import RunLog

ROOT = Path(__file__).resolve().parents[2]
# ``make test`` takes a sample of what is repeated in many layouts, ``make test-all`` everything.
TAKES_ALL = os.environ.get("TRINITY_TESTS") == "all"
PLAN_SECONDS = 1800 if TAKES_ALL else 600
# Small enough for a tenth of a second a step, and still three MoE layers with 32 experts each.
NARROW = (
    "--hidden-size 128 --ffn-hidden-size 384 --kv-channels 16 --moe-ffn-hidden-size 32 "
    "--moe-shared-expert-intermediate-size 32"
).split()
SHORT = (
    "--preset tiny --seq-length 64 --max-position-embeddings 64 --window-size 15,0 "
    "--global-batch-size 8 --micro-batch-size 4 --train-iters 10 --lr-warmup-fraction 0.5 "
    "--log-interval 1 --tensorboard-log-interval 1 --eval-iters 0 --seed 11"
).split()
SMALL = [*SHORT, *NARROW, "--moe-router-bias-update-rate", "2e-3", "--moe-aux-loss-coeff", "1e-4"]
ADAM = "--optimizer adam --lr 3e-3 --decoupled-lr 3e-3".split()
only_in_all = pytest.mark.skipif(not TAKES_ALL, reason="a part of make test-all")


def sampled[Key, Value](table: dict[Key, Value], *names: Key) -> dict[Key, Value]:
    """The entries of these names, in the order of the table; all of them in ``make test-all``."""
    assert set(names) <= set(table)
    return {name: value for name, value in table.items() if TAKES_ALL or name in names}


def load_of_study(study: str, name: str) -> ModuleType:
    """A module of a study in ``examples``; other studies have modules of the same name."""
    path = ROOT / "examples" / study / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{study}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        name: Folder of the run.
        flags: What is added to ``SMALL``; later flags win.
        checkpoints: Folder to load from and save to; nothing is loaded or saved without.
        probe: Arguments of ``worker.probed``.
    """

    name: str
    flags: str = ""
    checkpoints: Path | None = None
    probe: dict[str, Any] = field(default_factory=dict)


class Logs(dict[str, RunLog]):
    """What each job has logged, by name; a test that asks for one that had no GPUs is skipped."""

    def __missing__(self, name: str) -> RunLog:
        pytest.skip(f"{name} has more ranks than this machine has GPUs ({count_cuda_devices()})")


def environment() -> dict[str, str]:
    """For child processes: one thread, no compiler, nothing of W&B."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "WANDB_MODE": "disabled",
    }


def train(data: Path, folder: Path, worlds: list[tuple[int, list[Job]]]) -> Logs:
    """Run the jobs one after the other, the ranks of each world in fresh processes.

    Where there are GPUs every rank has one; worlds that have too many ranks are left out.

    Args:
        data: Prepared data.
        folder: Parent of the jobs' folders.
        worlds: Number of ranks and the jobs to run on them.

    Returns:
        What each job has logged, by name.
    """
    if gpus := count_cuda_devices():
        worlds = [(ranks, jobs) for ranks, jobs in worlds if ranks <= gpus]
    plan = [
        {"ranks": ranks, "jobs": [entry(data, folder, j) for j in jobs]} for ranks, jobs in worlds
    ]
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    answer = run_plan(path)
    if answer != "done":
        lines = (folder / "log").read_text(errors="replace").splitlines()
        pytest.fail("\n".join([f"the plan ended with {answer or 'no answer'}", *lines[-60:]]))
    return Logs({job.name: RunLog(folder / job.name) for _, jobs in worlds for job in jobs})


def train_in_order(data: Path, folder: Path, jobs: list[tuple[int, Job]]) -> Logs:
    """Run jobs in this order; those that follow each other on as many ranks share processes.

    Args:
        data: Prepared data.
        folder: Parent of the jobs' folders.
        jobs: Number of ranks and job.
    """
    groups = itertools.groupby(jobs, key=lambda pair: pair[0])
    return train(data, folder, [(ranks, [job for _, job in group]) for ranks, group in groups])


def run_plan(path: Path) -> str:
    """Let the worker of this session run a plan; how it ended, empty if the worker has died."""
    process = worker()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    is_answered = select.select([process.stdout], [], [], PLAN_SECONDS)[0]
    if is_answered and (answer := process.stdout.readline().strip()):
        return answer
    process.kill()
    process.wait()
    worker.cache_clear()
    return ""


@functools.cache
def worker() -> subprocess.Popen[str]:
    """One process that has imported Megatron, and forks the ranks of all tests of this session.

    It ends when its stdin does, that is with this process.
    """
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("worker.py"))],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_script(
    script: str, data: Path, folder: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    """Run a script that starts the training entry, on two ranks of EP2 under torchrun.

    Args:
        script: Its text; it gets the flags of ``SMALL``.
        data: Prepared data.
        folder: Gets the script, and ``run`` as ``--out``.
        flags: Further flags.
    """
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", str(path), *SMALL]
    command += ["--data", str(data), "--out", str(folder / "run")]
    command += ["--expert-model-parallel-size", "2", *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def entry(data: Path, folder: Path, job: Job) -> dict[str, Any]:
    """A job as the worker reads it."""
    small = SHORT if "--preset" in job.flags else SMALL  # another preset has its own widths
    if "--step-batch-size-schedule" in job.flags:  # in the place of the other
        at = small.index("--global-batch-size")
        small = small[:at] + small[at + 2 :]
    flags = [*small, "--data", str(data), "--tensorboard-dir", str(folder / job.name)]
    flags += ["--data-cache-path", str(folder / "data_cache")]
    if job.checkpoints:
        flags += ["--save", str(job.checkpoints), "--load", str(job.checkpoints)]
        flags += ["--save-interval", "10"]
    flags += job.flags.split()
    return {"flags": flags, "probe": job.probe, "save": str(job.checkpoints)}
