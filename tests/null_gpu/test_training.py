"""The path of a GPU run, rehearsed on a device that computes nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional_tests.launch import ROOT, only_in_all
from tests.null_gpu.conftest import Result

pytestmark = [pytest.mark.null_gpu, pytest.mark.slow]


def train(variables: dict[str, str], data: Path, out: Path, *flags: str) -> str:
    """``trinity-megatron train --preset tiny``; what it says.

    Without torch's cache of memory, so that what no kernel has written is 0, and not what another
    tensor has left: metrics are read, and no square root wants a negative number.
    """
    variables = {**variables, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--preset", "tiny"]
    command += ["--data", str(data), "--out", str(out), *flags]
    done = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def out(variables: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with nothing but the preset, the data and the folder."""
    out = tmp_path_factory.mktemp("run") / "out"
    train(variables, data, out)
    return out


def latest(out: Path) -> int:
    """The step of the newest checkpoint."""
    return int((out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


def test_it_runs_from_start_to_end(out: Path) -> None:
    assert latest(out) == 400
    assert (out / "report" / "report.html").exists()


@only_in_all
def test_it_goes_on(out: Path, variables: dict[str, str], data: Path) -> None:
    output = train(variables, data, out, "--train-iters", "402")
    assert "402, of which 400 before this start" in output
    assert latest(out) == 402


SHORT = "--preset tiny --train-iters 5 --eval-iters 0 --micro-batch-size 2"
RUNS = {
    # The judge of a step reads the loss where the gradient norm is waited for anyway.
    "plain": "--log-interval 100 --skip-spikes 6 --check-replicas 100 --log-straggler",
    # All metrics in each step, and documents that do not see each other.
    "documents": "--log-interval 1 --tensorboard-dir tb --dataloader-inter-document-masking",
}
MICRO_BATCHES, MOST_LAUNCHES = 4, 2600


@pytest.fixture(scope="module", params=RUNS)
def steps(
    request: pytest.FixtureRequest,
    rehearse: Callable[..., Result],
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict]:
    """Steps of four micro-batches, without the first and the last, as sm_90."""
    folder = str(tmp_path_factory.mktemp("logged"))
    flags = f"{SHORT} {RUNS[request.param]}".replace(" tb ", f" {folder} ").split()
    result = rehearse(*flags, "--data", str(data))
    assert result.code == 0, result.output[-3000:]
    assert len(result.steps) == 5
    return result.steps[1:-1]


def test_who_waits_for_the_device(steps: list[dict]) -> None:
    """A few numbers of the step, and the documents of each micro-batch; nothing for a layer."""
    for step in steps:
        assert sum(step["waits"].values()) <= 4 + MICRO_BATCHES, step["waits"]
        assert not any("forward_step" in where for where in step["waits"]), step["waits"]


def test_a_step_that_logs_nothing_waits_three_times(
    steps: list[dict], request: pytest.FixtureRequest
) -> None:
    """For the gradient norm, and for Megatron's loss scale and sums."""
    if "plain" in request.node.name:
        assert all(sum(step["waits"].values()) <= 3 for step in steps), steps[0]["waits"]
        assert all(step["counts"]["device_syncs"] == 0 for step in steps)
        # Four micro-batches of four layers, loss and optimizer: some 110 a layer in both passes.
        assert all(step["counts"]["launches"] <= MOST_LAUNCHES for step in steps)


def test_nothing_is_compiled_or_allocated_later(steps: list[dict]) -> None:
    assert len({step["graphs"] for step in steps}) == 1
    assert all(step["counts"]["allocations"] == 0 for step in steps[1:])
