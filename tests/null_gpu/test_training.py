"""The path of a GPU run, rehearsed on a device that computes nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional_tests.launch import ROOT
from tests.null_gpu.conftest import Result

pytestmark = [pytest.mark.null_gpu, pytest.mark.slow]

Rehearse = Callable[..., Result]


@pytest.fixture(scope="module")
def run(variables: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` with nothing but the preset, the data and the folder; and then the same again."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--preset", "tiny"]
    command += ["--data", str(data), "--out", str(out)]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_it_runs_from_start_to_end(run: Path) -> None:
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "400"
    assert (run / "report" / "index.html").exists()
