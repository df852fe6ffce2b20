"""A disk that refuses a save ends the run with one error; the checkpoint before it stands."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional_tests.launch import SMALL, environment, run_script

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# From the third step on no file may have more than 100 kB.
SCRIPT = """
import functools
import resource
from trinity_megatron.training import pretrain
from megatron.training import get_args, training

train_step = training.train_step

@functools.wraps(train_step)  # the registry knows what it wraps
def fill_disk(*args, **kwargs):
    if get_args().curr_iteration == 2:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    return train_step(*args, **kwargs)

if __name__ == "__main__":  # the helper processes of a save import this module again
    training.train_step = fill_disk
    pretrain.run()
"""


def test_the_checkpoint_before_stands(data: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    result = run_script(SCRIPT, data, tmp_path, "--save-interval", "2")
    assert result.returncode != 0
    expected = f"error: the save of step 4 to {checkpoints} failed: File too large. "
    assert result.stderr.count(expected) == 1, result.stderr
    assert "The checkpoint of step 2 stands. Remedy: raise the limit" in result.stderr
    own, _, _ = result.stderr.partition("torch.distributed.elastic")  # torchrun adds its own
    assert "CheckpointException" not in own
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (checkpoints / "iter_0000004").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MB, for root only."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)])
    if mounted.returncode:
        pytest.skip("a disk can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_asynchronous_save(small_disk: Path, data: Path) -> None:
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", *SMALL, "--data", str(data)]
    command += ["--out", str(small_disk / "run"), "--train-iters", "60"]

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *flags], env=environment(), capture_output=True, text=True, timeout=300
        )

    # One is there from the start: how long an asynchronous one takes depends on the machine.
    first = run("--save-interval", "10", "--exit-interval", "10")
    assert first.returncode == 0, first.stderr
    result = run("--async-save", "--save-interval", "25")
    assert result.returncode == 2, result.stderr
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    checkpoints = small_disk / "run" / "checkpoints"
    latest = (checkpoints / "latest_checkpointed_iteration.txt").read_text()
    assert "failed: No space left on device" in error
    assert f"The checkpoint of step {latest} stands. Remedy: make space" in error
    assert "Traceback" not in result.stderr
    assert max(checkpoints.glob("iter_*")).name == f"iter_{int(latest):07d}"
