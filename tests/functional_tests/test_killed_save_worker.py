"""The process that saves in the background is killed: the run ends with one error."""

from pathlib import Path

import pytest

from tests.functional_tests.launch import only_in_all, run_script

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# The process of rank 1 is there from the save of step 2 on; it is stopped before that of step 4, or
# killed at once.
SCRIPT = """
import functools
import os
import signal
import threading
import torch
from trinity_megatron.training import pretrain
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.training import get_args, training

train_step = training.train_step

@functools.wraps(train_step)  # the registry knows what it wraps
def kill_worker(*args, **kwargs):
    if get_args().curr_iteration == 3 and get_args().rank == 1:
        pid = PersistentAsyncCaller._persistent_process.pid
        if {is_stopped}:
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(3, os.kill, (pid, signal.SIGKILL)).start()
        else:
            os.kill(pid, signal.SIGKILL)
    return train_step(*args, **kwargs)

if __name__ == "__main__":  # the helper processes of a save import this module again
    training.train_step = kill_worker
    pretrain.run()
"""


@pytest.mark.parametrize(
    "is_stopped", [pytest.param(False, marks=only_in_all, id="idle"), pytest.param(True, id="save")]
)
def test_the_checkpoint_before_stands(is_stopped: bool, data: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    script = SCRIPT.format(is_stopped=is_stopped)
    result = run_script(script, data, tmp_path, "--save-interval", "2", "--async-save")
    assert result.returncode == 1  # `supervise` starts it again
    expected = (
        f"error: the save of step 4 to {checkpoints} failed: the process that writes for rank 1 "
        "was ended by SIGKILL. The checkpoint of step 2 stands. Remedy: look whether the machine"
    )
    assert result.stderr.count(expected) == 1, result.stderr
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (checkpoints / "iter_0000004").exists()
