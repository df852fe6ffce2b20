"""A disk that refuses a save: one message, the checkpoint before it stands, the run goes on."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional_tests.launch import SMALL, environment, only_in_all, run_script

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# From the third step on, up to that of MENDED, no file may have more than 100 kB.
SCRIPT = """
import functools
import os
import resource
from trinity_megatron.training import pretrain
from megatron.training import get_args, training

train_step = training.train_step

@functools.wraps(train_step)  # the registry knows what it wraps
def fill_disk(*args, **kwargs):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    is_full = 2 <= get_args().curr_iteration < int(os.environ.get("MENDED", "99"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if is_full else hard, hard))
    return train_step(*args, **kwargs)

if __name__ == "__main__":  # the helper processes of a save import this module again
    training.train_step = fill_disk
    pretrain.run()
"""


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--train-iters", "4"], id="last"),
        pytest.param(["--on-failed-save", "fail"], marks=only_in_all, id="fail"),
    ],
)
def test_the_checkpoint_before_stands(flags: list[str], data: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    result = run_script(SCRIPT, data, tmp_path, "--save-interval", "2", *flags)
    assert result.returncode != 0
    expected = f"error: the save of step 4 to {checkpoints} failed: File too large. "
    assert result.stderr.count(expected) == 1, result.stderr
    assert "The checkpoint of step 2 stands. Remedy: raise the limit" in result.stderr
    own, _, _ = result.stderr.partition("torch.distributed.elastic")  # torchrun adds its own
    assert "CheckpointException" not in own
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (checkpoints / "iter_0000004").exists()


def test_the_training_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MENDED", "6")
    checkpoints = tmp_path / "run" / "checkpoints"
    result = run_script(SCRIPT, data, tmp_path, "--save-interval", "2", "--train-iters", "8")
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    for step in (4, 6):
        warning = f"> WARNING: the save of step {step} to {checkpoints} failed: File too large. "
        assert said.count(warning) == 1, said
    assert said.count("The training goes on (--on-failed-save continue)") == 2
    assert {path.name for path in checkpoints.glob("iter_*")} == {"iter_0000002", "iter_0000008"}
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "8"


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


@only_in_all
def test_an_asynchronous_save(small_disk: Path, data: Path) -> None:
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", *SMALL, "--data", str(data)]
    command += ["--out", str(small_disk / "run"), "--train-iters", "30"]

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *flags], env=environment(), capture_output=True, text=True, timeout=300
        )

    # One is there from the start: how long an asynchronous one takes depends on the machine.
    first = run("--save-interval", "10", "--exit-interval", "10")
    assert first.returncode == 0, first.stderr
    result = run("--async-save", "--save-interval", "13")
    assert result.returncode == 2, result.stderr
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    checkpoints = small_disk / "run" / "checkpoints"
    latest = (checkpoints / "latest_checkpointed_iteration.txt").read_text()
    assert "failed: No space left on device" in error
    assert f"The checkpoint of step {latest} stands. Remedy: make space" in error
    assert "Traceback" not in result.stderr
    assert max(checkpoints.glob("iter_*")).name == f"iter_{int(latest):07d}"
