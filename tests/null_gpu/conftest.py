"""The null device, built once for a session, and runs on it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.functional_tests.launch import ROOT
from tests.null_gpu.build import build, why_not


@dataclass(frozen=True)
class Result:
    """What a run has left.

    Attributes:
        code: Exit code.
        output: Of both streams.
        steps: What ``train.py`` has recorded, see there.
    """

    code: int
    output: str
    steps: list[dict[str, Any]]


@pytest.fixture(scope="session")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the device, and one rank."""
    if reason := why_not():
        pytest.skip(reason)
    device = build(tmp_path_factory.mktemp("device"))
    # Tests of the CPU path may have banned the compiler in this process.
    own = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    return {
        **own,
        **device,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }


@pytest.fixture(scope="session")
def rehearse(
    variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Result]:
    """Run the training entry on the device, and read what its steps did."""

    def run(*flags: str, **more: str) -> Result:
        folder = tmp_path_factory.mktemp("steps")
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        entry = "fake_world" if "--fake-process-group" in flags else "train"
        command = [sys.executable, "-m", f"tests.null_gpu.{entry}", str(folder / "steps.jsonl")]
        done = subprocess.run(
            [*command, *flags],
            env={**variables, **rank, **more},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        file = folder / "steps.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return Result(done.returncode, done.stdout + done.stderr, [json.loads(x) for x in lines])

    return run
