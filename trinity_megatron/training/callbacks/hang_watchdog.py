"""Notice when no step ends any more: say which rank hangs and where, with the stacks of all.

The collectives give up after ``--distributed-timeout-minutes``, and then every rank complains of
the others.  Before that each rank looks at itself, and one says which it is that the others wait
for (``process.watchdog``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host
from trinity_megatron.process.alarms import Alarms
from trinity_megatron.process.watchdog import Watchdog
from trinity_megatron.training.callbacks.callback import Callback

STACKS_NAME = "stacks"
# As torch's own reader of these files wants it: torchfrtrace --prefix nccl_trace_rank_ STACKS
_TRACE_NAME = "nccl_trace_rank_"
_NUM_RECORDED = "2000"  # collectives; the least that torch recommends


class HangWatchdog(Callback):
    """Tells the watchdog of this rank where the training is.

    Args:
        watchdog: Started, and stopped by the caller.
        args: Of the run.

    Attributes:
        has_stepped: Whether this start has completed a step.
    """

    def __init__(self, watchdog: Watchdog, args: argparse.Namespace) -> None:
        self._watchdog, self._args = watchdog, args
        self._step_start = 0.0
        self.has_stepped = False

    def on_train_start(self) -> None:
        """Record that the loop begins."""
        self._watchdog.beat("before the first step")

    def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
        """Record the start of a step."""
        self._step_start = time.monotonic()
        self._watchdog.beat(f"in step {iteration}")

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Record the end of a step; the first one of a start compiles, and is no measure."""
        if self.has_stepped:
            took = time.monotonic() - self._step_start
            self._watchdog.longest = max(self._watchdog.longest, took)
        self.has_stepped = True
        self._watchdog.beat(f"after step {iteration}")

    def on_checkpoint_save_start(
        self, iteration: int, model: Any, optimizer: Any, *, non_persistent: bool
    ) -> None:
        """Record that a save begins."""
        self._watchdog.beat(f"in the save after step {iteration}")

    def on_checkpoint_save_end(self, iteration: int) -> None:
        """Record that a save has ended, or goes on in the background."""
        self._watchdog.beat(f"after the save of step {iteration}")

    def on_evaluation_start(self) -> None:
        """Record that an evaluation begins."""
        self._watchdog.beat(f"in the evaluation after step {self._args.curr_iteration + 1}")

    def on_evaluation_end(self) -> None:
        """Record that an evaluation has ended."""
        self._watchdog.beat("after an evaluation")

    def on_train_end(self) -> None:
        """Record that the loop has ended."""
        self._watchdog.beat("after the last step")

    def beat(self) -> None:
        """Record that something has happened where the training is."""
        self._watchdog.beat()

    def watched[**P, R](self, forward_step: Callable[P, R]) -> Callable[P, R]:
        """A forward step that records each micro-batch: an evaluation has many.

        Args:
            forward_step: Of Megatron.
        """

        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            self._watchdog.beat()
            return forward_step(*args, **kwargs)

        return wrapper


@contextmanager
def hangs_watched(args: argparse.Namespace, alarms: Alarms) -> Iterator[HangWatchdog]:
    """A watchdog of the run, from its start-up on.

    Args:
        args: Of the run, checked.
        alarms: Are told of a hang.
    """
    folder = Path(args.out) / STACKS_NAME if args.out else None
    if not is_cpu_host():  # before the process groups are made
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _NUM_RECORDED)
    callback: HangWatchdog

    def end_after() -> float:
        return collective_timeout(args, is_after_first_step=callback.has_stepped)

    watchdog = Watchdog(
        args.rank,
        args.world_size,
        folder,
        seconds=args.hang_seconds,
        end_after=end_after,
        find_collective=lambda: None if is_cpu_host() else _nccl_collective(args.rank, folder),
        alarms=alarms,
    )
    callback = HangWatchdog(watchdog, args)
    watchdog.start()
    try:
        yield callback
    finally:
        watchdog.stop()


def collective_timeout(args: argparse.Namespace, *, is_after_first_step: bool) -> float:
    """Seconds after which a collective gives up.

    Args:
        args: Of the run.
        is_after_first_step: Whether Megatron has set the time-out for what follows it.
    """
    later = args.distributed_timeout_seconds_after_init
    if is_after_first_step and later is not None:
        return later
    return 60.0 * args.distributed_timeout_minutes


def _nccl_collective(rank: int, folder: Path | None) -> str | None:
    """What NCCL's flight recorder says of this rank; its whole record goes to the folder."""
    recorder = torch._C._distributed_c10d
    if folder is not None and hasattr(recorder, "_dump_nccl_trace"):
        with contextlib.suppress(OSError):
            (folder / f"{_TRACE_NAME}{rank}").write_bytes(recorder._dump_nccl_trace())
    if not hasattr(recorder, "_dump_nccl_trace_json"):
        return None
    record = json.loads(recorder._dump_nccl_trace_json(True, True))
    return find_nccl_collective(record.get("entries", ()))


def find_nccl_collective(entries: Sequence[Mapping[str, Any]]) -> str | None:
    """The collective that a device waits in: the oldest that is not complete.

    Args:
        entries: Of a flight recorder's dump, in the order in which they were enqueued.

    Returns:
        Its name, number, process group and whether the device has begun it; None without one.

    Source: torch/csrc/distributed/c10d/FlightRecorder.hpp, version 2.10 of the dump.
    """
    for entry in entries:
        if entry["state"] == "completed" or entry.get("retired"):
            continue
        number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
        group = entry["process_group"][1] or entry["process_group"][0]
        begun = "" if entry["state"] == "started" else ", which its device has not begun"
        return f"{entry['profiling_name']} {number} of {group}{begun}"
    return None
