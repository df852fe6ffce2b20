"""One readable line an interval: step, loss, MaxVio, tokens a second and the time that is left."""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.training import get_args, get_tensorboard_writer
from megatron.training.async_utils import is_empty_async_queue
from megatron.training.utils import is_last_rank

from trinity_megatron.process.screen import screen_of, tell
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.training.run_writer import RunWriter

_MAX_VIOLATION = "moe/mean_max_violation"


class Progress(Callback):
    """Prints the progress of a run on the rank that has its loss.

    On a terminal the line is renewed in place in every step whose metrics are written anyway;
    elsewhere there is one line every ``--log-interval`` steps.  Only there is the loss read from
    the device.

    Args:
        metrics: The latest scalars of a step, by name; the caller keeps them up to date.
    """

    def __init__(self, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics
        self._loss: torch.Tensor | None = None
        self._num_losses = self._num_skipped = 0
        self._tokens, self._first_step = 0, 0
        self._interval_start = self._first_step_end = 0.0
        self._is_terminal = screen_of(sys.stdout).isatty()
        self._saved: int | None = None  # a step whose save is not complete
        self._is_open = False  # a line of the terminal that the next one replaces

    def on_train_start(self) -> None:
        """Say where the run starts."""
        args = get_args()
        self._interval_start = time.monotonic()
        if is_last_rank():
            start = f"from step {args.iteration}" if args.iteration else "from random weights"
            tell(f"training {args.train_iters or ''} steps {start}".replace("  ", " "))

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Add a step; print the line where it is due."""
        args = get_args()
        losses, is_skipped = result[0], bool(result[1])
        self._num_skipped += is_skipped
        if not is_last_rank():
            return
        self._tokens += args.seq_length * get_current_running_global_batch_size()
        if not is_skipped and "lm loss" in losses:
            loss = losses["lm loss"].detach().float().mean()
            self._loss = loss if self._loss is None else self._loss + loss
            self._num_losses += 1
        now = time.monotonic()
        if not self._first_step:
            self._first_step, self._first_step_end = iteration, now
        is_due = iteration % args.log_interval == 0 or iteration == args.train_iters
        if is_due or (self._is_terminal and iteration % args.tensorboard_log_interval == 0):
            self._show(args, iteration, now)
        if is_due:
            self._begin_interval(now)

    def on_evaluation_start(self) -> None:
        """Finish the line of the terminal."""
        self._finish_line()

    def on_evaluation_end(self) -> None:
        """Print the losses of the evaluation."""
        writer = get_tensorboard_writer()
        if isinstance(writer, RunWriter):
            for name, loss in writer.latest_validation().items():
                tell(f"{name} {loss:.4f}")

    def on_checkpoint_save_start(self, *args: Any, **kwargs: Any) -> None:
        """Finish the line of the terminal."""
        self._finish_line()

    def on_checkpoint_save_end(self, iteration: int) -> None:
        """Note the save, which is complete now or later."""
        self._saved = iteration
        self.on_checkpoint_finalize_end()

    def on_checkpoint_finalize_end(self) -> None:
        """Print that a save has become complete."""
        if self._saved is None or not is_empty_async_queue():
            return
        if is_last_rank():
            self._finish_line()
            tell(f"saved step {self._saved} to {get_args().save}")
        self._saved = None

    def on_train_end(self) -> None:
        """Finish the line of the terminal."""
        self._finish_line()

    def _begin_interval(self, now: float) -> None:
        self._loss, self._num_losses, self._num_skipped = None, 0, 0
        self._tokens, self._interval_start = 0, now

    def _show(self, args: argparse.Namespace, iteration: int, now: float) -> None:
        loss = math.nan if self._loss is None else self._loss.item() / self._num_losses
        line = format_progress(
            iteration,
            args.train_iters,
            loss=loss,
            max_violation=self._metrics.get(_MAX_VIOLATION),
            tokens_per_second=self._tokens / (now - self._interval_start),
            seconds_left=self._seconds_left(args, iteration, now),
            num_skipped=self._num_skipped,
        )
        if self._is_terminal:
            tell(f"\r{line}\x1b[K", end="")
            self._is_open = True
        else:
            tell(line)

    def _seconds_left(self, args: argparse.Namespace, iteration: int, now: float) -> float | None:
        """Time for the steps to come at the mean of those so far, evaluations and saves included.

        The first step of a start compiles and fills caches, and does not count.
        """
        done = iteration - self._first_step
        if not done or not args.train_iters:
            return None
        return (now - self._first_step_end) / done * (args.train_iters - iteration)

    def _finish_line(self) -> None:
        if self._is_open:
            self._is_open = False
            tell("")


def format_progress(
    iteration: int,
    train_iters: int | None,
    *,
    loss: float,
    max_violation: float | None,
    tokens_per_second: float,
    seconds_left: float | None,
    num_skipped: int = 0,
) -> str:
    """The line of a step.

    Args:
        iteration: Number of the step, from 1.
        train_iters: Steps of the run; None if it has no fixed length.
        loss: Mean of the interval in nats per token; NaN if all its steps were skipped.
        max_violation: MaxVio, mean over the MoE layers; None if unknown.
        tokens_per_second: Of the interval.
        seconds_left: None if unknown.
        num_skipped: Skipped steps of the interval.
    """
    total = f"/{train_iters}" if train_iters else ""
    parts = [f"step {iteration:>{len(str(train_iters or ''))}}{total}", f"loss {loss:.4f}"]
    if max_violation is not None:
        parts.append(f"MaxVio {max_violation:.2f}")
    parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if num_skipped:
        parts.append(f"{num_skipped} steps skipped")
    if seconds_left is not None:
        parts.append(f"{datetime.timedelta(seconds=round(seconds_left))} left")
    return "  ".join(parts)
