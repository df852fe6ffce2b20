"""End a run whose gradient is NaN or infinite, without a further host sync."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron.training import get_args

from trinity_megatron.checkpoint.torch_dist.tracker import read_tracker
from trinity_megatron.errors import UserError
from trinity_megatron.training.callbacks.callback import Callback

_GRADIENT_NORM = 5  # in what Megatron's train_step returns


class GradientCheck(Callback):
    """Looks at the norm that clipping has read anyway; a loss without a number makes it none too.

    Muon has skipped the update.  The finite check keeps what AdamW made of it from being saved.
    """

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Look at the step.

        Raises:
            UserError: Names the step and the remedy.
        """
        norm = result[_GRADIENT_NORM]
        if norm is not None and not math.isfinite(norm):
            raise UserError(
                f"step {iteration}: the gradient norm is {norm}. {latest_checkpoint()} "
                "Remedy: start again from it with lower --lr and --decoupled-lr, or "
                "--iterations-to-skip the step; --rerun-mode validate_results says which "
                "micro-batch and bucket it was."
            )


def latest_checkpoint() -> str:
    """A sentence that names the latest checkpoint of the run."""
    folder = get_args().save
    if not folder:
        return "No checkpoint is kept."
    step = read_tracker(Path(folder)) if "://" not in folder else None
    return f"The latest checkpoint in {folder} stands{f': step {step}' if step else ''}."
