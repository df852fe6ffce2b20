"""``--skip-spikes``: leave the update of a step out whose loss or gradient norm is a spike.

The loss is summed over all ranks in a collective of two numbers before the gradient norm is read;
the norm is of all ranks already.  So every rank has the same numbers, window and verdict, and the
host waits for the device no further time.  Nothing of a skipped step stays: see
`optimizer/sharded/optimizer_chain.py` for the optimizer, `model/moe/bias_update.py` for the expert
bias.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

from trinity_megatron.checkpoint.torch_dist.tracker import iteration_name
from trinity_megatron.errors import MachineError, UserError
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.optimizer.sharded.optimizer_chain import SkippingOptimizer
from trinity_megatron.optimizer.spike_rule import SpikeRule
from trinity_megatron.process.alarms import Alarms
from trinity_megatron.process.screen import tell_once
from trinity_megatron.telemetry.step_loss import StepLoss
from trinity_megatron.telemetry.step_statistics import statistics_of
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.training.callbacks.gradient_check import latest_checkpoint
from trinity_megatron.training.callbacks.save_errors import save_folder
from trinity_megatron.training.callbacks.step_metrics import is_logging_step
from trinity_megatron.training.first_rank import from_first_rank
from trinity_megatron.training.resume import read_saved_args
from trinity_megatron.training.rewind import rewind

SKIPPED_TAG = "train/skipped_steps"
# A single bad batch is over in a step or two; a longer series is a run that has left its course.
MOST_IN_A_ROW = 10


class SpikeSkipping(Callback):
    """Judges every step of a run, and counts those that are skipped.

    Args:
        config: Of the model.
        sigma: See `SpikeRule`.
        window: See `SpikeRule`.
        alarms: Are told of each step that is skipped.
    """

    def __init__(
        self, config: TrinityConfig, *, sigma: float, window: int, alarms: Alarms | None = None
    ) -> None:
        self._alarms = alarms or Alarms()
        self._rule = SpikeRule(sigma=sigma, window=window)
        self._statistics = statistics_of(config)
        self._loss = StepLoss()
        self._reason: str | None = None
        self._num_skipped = self._num_in_a_row = 0

    def on_train_start(self) -> None:
        """Go on with the window of the checkpoint."""
        self._statistics.step_loss = self._loss
        state = from_first_rank(_saved_state)
        if state is not None:
            self._rule.load_state_dict(state["window"])
            self._num_skipped, self._num_in_a_row = state["skipped"], state["in_a_row"]

    def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
        """Have the optimizer ask before its update."""
        assert isinstance(optimizer, SkippingOptimizer), type(optimizer)
        optimizer.judge = self
        self._loss.clear()
        self._reason = None

    def begin(self) -> None:
        """Sum the loss over all ranks."""
        self._loss.exchange(torch.device(torch.cuda.current_device()))

    def should_skip(self, grad_norm: float) -> bool:
        """Whether the step is a spike; see `StepJudge`."""
        self._reason = self._rule.judge(self._loss.read(), grad_norm)
        return self._reason is not None

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Count and say that the step was skipped.

        Raises:
            MachineError: One step after the other is skipped, and the next start goes back.
            UserError: The same, and it does not.
        """
        if self._reason is not None:
            self._num_skipped += 1
            self._num_in_a_row += 1
            message = f"step {iteration} is skipped: {self._reason}"
            tell_once(message)
            self._alarms.send_once("spike", message)
        else:
            self._num_in_a_row = 0
        if self._reason is not None or is_logging_step(iteration):
            self._write(iteration)
        if self._num_in_a_row >= MOST_IN_A_ROW:
            self._end(iteration)

    def _end(self, iteration: int) -> NoReturn:
        args, first = get_args(), iteration - self._num_in_a_row + 1
        what = (
            f"--skip-spikes: the last {self._num_in_a_row} steps up to step {iteration} were "
            f"skipped, so this is no single batch; the last one because {self._reason}. "
        )
        if args.rewind_on_spike:
            decided = from_first_rank(lambda: rewind(args, first, iteration))
            if decided is not None:
                raise MachineError(f"{what}--rewind-on-spike: {decided}.")
        raise UserError(
            f"{what}{latest_checkpoint()} Remedy: start again from it with lower --lr and "
            "--decoupled-lr, or with --iterations-to-skip these steps; or without "
            "--skip-spikes for a while, if other data have changed the loss."
        )

    def on_checkpoint_save_start(
        self, iteration: int, model: Any, optimizer: Any, *, non_persistent: bool
    ) -> None:
        """Have the checkpoint hold the window, in the arguments, which it holds anyway."""
        get_args().spike_window_state = {
            "window": self._rule.state_dict(),
            "skipped": self._num_skipped,
            "in_a_row": self._num_in_a_row,
        }

    def on_train_end(self) -> None:
        """Sum no more losses."""
        self._statistics.step_loss = None

    def _write(self, iteration: int) -> None:
        if writer := get_tensorboard_writer():
            writer.add_scalar(SKIPPED_TAG, self._num_skipped, iteration)
        if wandb_writer := get_wandb_writer():
            wandb_writer.log({SKIPPED_TAG: self._num_skipped}, iteration)


def _saved_state() -> dict[str, Any] | None:
    """The window in the checkpoint that was loaded; None without one."""
    args = get_args()
    if not args.iteration or args.finetune or not args.load:
        return None
    state = None
    for folder in _loaded_folders(args):
        try:  # its checksum was compared when it was loaded
            saved, _ = read_saved_args(folder, args.iteration, verify_checksums=False)
        except UserError:  # of another format
            continue
        state = getattr(saved, "spike_window_state", None)
    if state is None:
        tell_once("> --skip-spikes: the checkpoint holds no losses to compare with; they are new")
    return state


def _loaded_folders(args: argparse.Namespace) -> list[Path]:
    """Where the step that was loaded may lie; Megatron takes the newer one of two checkpoints."""
    folders = [Path(args.load)]
    if args.non_persistent_ckpt_type == "global":
        folders.append(save_folder(is_passing=True))
    return [folder for folder in folders if (folder / iteration_name(args.iteration)).is_dir()]
