"""A rank that hangs is named by itself while the others still wait, and all stacks are written."""

import re
from pathlib import Path

import pytest

from tests.functional_tests.launch import run_script

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# In its third step rank 1 sleeps for longer than the alarm waits.
SCRIPT = """
import functools
import os
import time
from trinity_megatron.training import pretrain
from trinity_megatron.training.callbacks import hang_watchdog
from megatron.training import get_args, training

hang_watchdog.SECONDS = 2.0
train_step = training.train_step

@functools.wraps(train_step)  # the registry knows what it wraps
def hang_in_here(*args, **kwargs):
    if get_args().curr_iteration == 2 and os.environ["RANK"] == "1":
        time.sleep(6)
    return train_step(*args, **kwargs)

if __name__ == "__main__":
    training.train_step = hang_in_here
    pretrain.run()
"""


def test_the_late_rank_is_named(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = run_script(SCRIPT, data, tmp_path, "--train-iters", "4")
    assert result.returncode == 0, result.stderr[-3000:]
    found = re.findall(
        r"rank (\d): nothing has happened for \d s in step 3; it (.*)", result.stderr
    )
    assert [rank for rank, _ in sorted(found)] == ["0", "1"], result.stderr[-3000:]
    waiting, late = (text for _, text in sorted(found))
    assert waiting.startswith("is in ") and "/torch/distributed/" in waiting
    assert late.startswith("is in hang_in_here, ") and f"stacks of all ranks in {run}" in late
    stacks = [(run / "stacks" / f"rank_0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "distributed_c10d.py" in stacks[0]
    assert "hang_in_here" in stacks[1]
    # One alarm for one stall.
    assert [text.count(" s in step 3; ") for text in stacks] == [1, 1]
