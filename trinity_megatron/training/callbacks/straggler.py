"""``--log-straggler``: name the rank that the others wait for.

Megatron's detector behind this flag is replaced: it times the forward pass of ``pretrain_gpt.py``
on a GPU, with the collectives inside it, prints the extremes without a verdict, and opens a port on
all addresses of rank 0.  Megatron's loop calls this one in its place, every ``--log-interval``.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host
from trinity_megatron.process.alarms import Alarms
from trinity_megatron.process.screen import tell_once
from trinity_megatron.telemetry.straggler_rule import (
    RECOVERED_RATIO,
    STRAGGLER_RATIO,
    WINDOW,
    Slowest,
    find_slowest,
)
from trinity_megatron.telemetry.tensorboard_log import STRAGGLER_TAG
from trinity_megatron.telemetry.work_time import DeviceMarks, HostMarks, WorkClock
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.upstream.entries import WAITS
from trinity_megatron.upstream.registry import replaced

RATIO_TAG, RANK_TAG = "speed/slowest_rank_ratio", "speed/slowest_rank"


class Straggler(Callback):
    """Measures this rank's work in each step, and compares it with the other ranks' now and then.

    Args:
        clock: Of this rank.
        alarms: Are told of a straggler.
    """

    def __init__(self, clock: WorkClock, alarms: Alarms) -> None:
        self._clock, self._alarms = clock, alarms
        self._places: list[str] = []
        self._has_stepped = False
        self._named: int | None = None

    def on_train_start(self) -> None:
        """Learn where each rank is; all ranks."""
        self._places = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(self._places, _own_place())

    def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
        """Start the clock."""
        self._clock.start()

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Stop the clock; the first step of a start compiles, and is no measure."""
        self._clock.stop()
        if not self._has_stepped:
            self._has_stepped = True
            self._clock.clear()

    def configure(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's detector would start its controller here."""

    def report(self, *args: Any, **kwargs: Any) -> bool:
        """Compare the ranks; Megatron's loop calls it after every ``--log-interval`` steps.

        One all-gather of some twenty numbers.
        """
        slowest = find_slowest(*_gather(self._clock.work()))
        if slowest is None:
            return False
        iteration = get_args().curr_iteration + 1
        message = self._judge(slowest)
        _write(slowest, message, iteration)
        if message is not None:
            tell_once(message)
            self._alarms.send_once("straggler", message)
        return True

    def _judge(self, slowest: Slowest) -> str | None:
        """What there is to say; None where nothing has changed."""
        if slowest.ratio >= STRAGGLER_RATIO and slowest.rank != self._named:
            self._named = slowest.rank
            return (
                f"straggler: {self._name(slowest.rank)} took {slowest.ratio:.2f} of the median of "
                f"the other ranks over the last {slowest.num_steps} steps"
            )
        if self._named is not None and slowest.ratios[self._named] < RECOVERED_RATIO:
            rank, self._named = self._named, None
            return (
                f"straggler: {self._name(rank)} is as fast as the other ranks again, over the "
                f"last {slowest.num_steps} steps"
            )
        return None

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._places[rank]})"


@contextmanager
def stragglers_named(args: argparse.Namespace, alarms: Alarms) -> Iterator[list[Straggler]]:
    """A callback that names stragglers, in a list; an empty one without ``--log-straggler``.

    Args:
        args: Of the run.
        alarms: See `Straggler`.
    """
    if not args.log_straggler:
        yield []
        return
    if args.world_size == args.pipeline_model_parallel_size > 1:
        tell_once(
            "> --log-straggler has no effect: it compares the ranks of a pipeline stage, and each "
            "has one"
        )
    clock = WorkClock(HostMarks() if is_cpu_host() else DeviceMarks(), WINDOW)
    straggler = Straggler(clock, alarms)
    with ExitStack() as stack:
        stack.enter_context(replaced("megatron.training.training:stimer", lambda _: straggler))
        for target in WAITS:
            # What this release of torch does not have stays away.
            if hasattr(_class_of(target), target.rpartition(".")[2]):
                stack.enter_context(replaced(target, clock.without))
        yield [straggler]


def _class_of(target: str) -> type:
    return getattr(torch.distributed.distributed_c10d, target.partition(":")[2].partition(".")[0])


def _own_place() -> str:
    host = f"host {socket.gethostname()}"
    return host if is_cpu_host() else f"{host}, GPU {torch.cuda.current_device()}"


def _gather(work: Any) -> tuple[np.ndarray, list[int]]:
    """Work of all ranks, ``[ranks, WINDOW]``, NaN where unknown; and the stage of each rank."""
    device, ranks = torch.cuda.current_device(), torch.distributed.get_world_size()
    own = torch.full((WINDOW + 1,), torch.nan, dtype=torch.float64)
    own[WINDOW] = mpu.get_pipeline_model_parallel_rank()
    if len(work):
        own[WINDOW - len(work) : WINDOW] = torch.tensor(work, dtype=torch.float64)
    everyone = [torch.empty_like(own, device=device) for _ in range(ranks)]
    torch.distributed.all_gather(everyone, own.to(device))
    table = torch.stack(everyone).cpu().numpy()
    return table[:, :WINDOW], table[:, WINDOW].astype(int).tolist()


def _write(slowest: Slowest, message: str | None, iteration: int) -> None:
    scalars = {RATIO_TAG: slowest.ratio, RANK_TAG: slowest.rank}
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
        if message is not None:
            writer.add_text(STRAGGLER_TAG, message, iteration - 1)  # see RunWriter.add_text
    if wandb_writer := get_wandb_writer():
        wandb_writer.log({**scalars, **({STRAGGLER_TAG: message} if message else {})}, iteration)
