"""A run that skips one step after the other ends."""

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.training import get_args, global_vars  # noqa: E402

from trinity_megatron.errors import UserError  # noqa: E402
from trinity_megatron.training.arguments.checks import check_spikes  # noqa: E402
from trinity_megatron.training.callbacks.spike_skipping import (  # noqa: E402
    MOST_IN_A_ROW,
    SpikeSkipping,
)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A rank alone, whose run has saved step 40."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    args = Namespace(
        save=str(tmp_path),
        load=None,
        iteration=0,
        finetune=False,
        rank=0,
        tensorboard_dir=None,
        rewind_on_spike=False,
    )
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield tmp_path
    torch.distributed.destroy_process_group()


def judge_step(skipping: SpikeSkipping, step: int, loss: float) -> bool:
    """What the training loop calls in a step."""
    skipping._loss.clear()
    skipping._loss.add(torch.tensor(loss * 8), torch.tensor(8))
    skipping.begin()
    is_skipped = skipping.should_skip(1.0)
    skipping.on_train_step_end(step, None, None, None)
    return is_skipped


def test_it_ends_and_names_the_checkpoint(world: Path) -> None:
    skipping = SpikeSkipping(SimpleNamespace(), sigma=6.0, window=8)
    skipping.on_train_start()
    for step in range(1, 41):
        # One good step between two bad ones: no series.
        assert judge_step(skipping, step, math.nan if step % 2 else 4.0) == bool(step % 2)
    for step in range(41, 40 + MOST_IN_A_ROW):
        assert judge_step(skipping, step, math.inf)
    with pytest.raises(UserError, match=f"last {MOST_IN_A_ROW} steps .*stands: step 40. Remedy"):
        judge_step(skipping, 40 + MOST_IN_A_ROW, 1e9)


@pytest.mark.parametrize("folder", ["", "non_persistent"])
def test_the_window_of_a_checkpoint(folder: str, world: Path) -> None:
    from megatron.core import dist_checkpointing

    before = SpikeSkipping(SimpleNamespace(), sigma=6.0, window=8)
    before.on_train_start()
    for step in range(1, 9):
        judge_step(before, step, 4.0 + step % 2)
    before.on_checkpoint_save_start(8, None, None, non_persistent=bool(folder))
    args = get_args()
    made = world / folder / "iter_0000008"
    made.mkdir(parents=True)
    dist_checkpointing.save({"args": args}, str(made))
    args.iteration, args.load, args.non_persistent_ckpt_type = 8, str(world), "global"
    args.non_persistent_global_ckpt_dir = None
    after = SpikeSkipping(SimpleNamespace(), sigma=6.0, window=8)
    after.on_train_start()
    assert judge_step(after, 9, 9.0)
    assert not judge_step(after, 10, 4.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_spikes": 0.0}, "SIGMA above 0"),
        ({"spike_window": 7}, "at least 8"),
        ({"rerun_mode": "validate_results"}, "--rerun-mode validate_results"),
        ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph"),
        ({"fp16": True}, "--fp16: its loss scaling"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, object], message: str) -> None:
    good = {
        "skip_spikes": 6.0,
        "spike_window": 8,
        "rerun_mode": "disabled",
        "optimizer_cuda_graph": False,
        "fp16": False,
    }
    check_spikes(Namespace(**good))
    with pytest.raises(UserError, match=message):
        check_spikes(Namespace(**good | changes))
