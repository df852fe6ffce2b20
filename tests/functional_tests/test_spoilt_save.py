"""A state that is no number is not saved, and the run says so."""

from pathlib import Path

import pytest

from tests.functional_tests.launch import run_script

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Rank 1 spoils a weight of its experts when the third step has been made.
SCRIPT = """
import functools
import os
import torch
from trinity_megatron.training import pretrain
from megatron.training import get_args, training

train_step = training.train_step

@functools.wraps(train_step)  # the registry knows what it wraps
def spoil(step, data, model, *args, **kwargs):
    result = train_step(step, data, model, *args, **kwargs)
    if get_args().curr_iteration == 2 and os.environ["RANK"] == "1":
        weights = dict(model[0].named_parameters())
        name = next(name for name in weights if "mlp.experts" in name)
        weights[name].data.view(-1)[7] = float("nan")
    return result

if __name__ == "__main__":  # the helper processes of a save import this module again
    training.train_step = spoil
    pretrain.run()
"""


def test_the_checkpoint_before_stands(data: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    result = run_script(SCRIPT, data, tmp_path, "--save-interval", "1")
    assert result.returncode != 0
    assert "error: step 3 is not saved: NaN or infinity in " in result.stderr, result.stderr
    assert "mlp.experts" in result.stderr and "(rank 1)" in result.stderr
    assert f"The latest checkpoint in {checkpoints} stands" in result.stderr
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (checkpoints / "iter_0000003").exists()
