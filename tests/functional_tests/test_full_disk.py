"""A disk that refuses a save ends the run with one error; the checkpoint before it stands."""

from pathlib import Path

import pytest

from tests.functional_tests.launch import run_script

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# From the third step on no file may have more than 100 kB.
SCRIPT = """
import resource
from trinity_megatron.training import pretrain
from megatron.training import get_args, training

train_step = training.train_step

def fill_disk(*args, **kwargs):
    if get_args().curr_iteration == 2:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    return train_step(*args, **kwargs)

if __name__ == "__main__":  # the helper processes of a save import this module again
    training.train_step = fill_disk
    pretrain.run()
"""


@pytest.mark.parametrize("flags", ["", "--async-save --async-strategy mcore"])
def test_the_checkpoint_before_stands(flags: str, data: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    result = run_script(SCRIPT, data, tmp_path, "--save-interval", "2", *flags.split())
    assert result.returncode != 0
    expected = f"error: the save of step 4 to {checkpoints} failed: File too large. "
    assert result.stderr.count(expected) == 1, result.stderr
    assert "The checkpoint of step 2 stands. Remedy: raise the limit" in result.stderr
    own, _, _ = result.stderr.partition("torch.distributed.elastic")  # torchrun adds its own
    assert "CheckpointException" not in own
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (checkpoints / "iter_0000004").exists()
