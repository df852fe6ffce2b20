"""Say that the disk will be full a day before it is, not at the save."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.training.async_utils import is_empty_async_queue

from trinity_megatron.checkpoint.torch_dist.tracker import iteration_name
from trinity_megatron.process.alarms import Alarms
from trinity_megatron.process.screen import tell
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.training.preflight import format_bytes

SECONDS_AHEAD = 24 * 3600.0


class DiskSpace(Callback):
    """Looks at the free space after each save that is complete; rank 0 has one.

    Args:
        args: Of the run.
        clock: Of the time between saves.
        alarms: Are told what is said.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        clock: Callable[[], float] = time.monotonic,
        alarms: Alarms | None = None,
    ) -> None:
        self._alarms = alarms or Alarms()
        self._args, self._folder, self._clock = args, Path(args.save), clock
        self._saving: int | None = None
        self._last_save: float | None = None
        self._has_warned = False

    def on_checkpoint_save_end(self, iteration: int) -> None:
        """Note the save, which is complete now or later."""
        self._saving = iteration
        self.on_checkpoint_finalize_end()

    def on_checkpoint_finalize_end(self) -> None:
        """Look at the disk if a save has become complete."""
        if self._saving is None or not is_empty_async_queue():
            return
        step, self._saving = self._saving, None
        now, before = self._clock(), self._last_save
        self._last_save = now
        try:
            size = folder_bytes(self._folder / iteration_name(step))
            disk, kept = shutil.disk_usage(self._folder), len(list(self._folder.glob("iter_*")))
        except OSError:
            return
        if not disk.total or not size:  # some network filesystems say 0
            return
        fits = count_fitting(disk.free, size, to_come=self._to_come(step, kept))
        seconds = math.inf if before is None else fits * (now - before)
        if fits == math.inf or (fits > 0 and seconds > SECONDS_AHEAD):
            self._has_warned = False
        elif not self._has_warned:
            self._has_warned = True
            when = "the next save will fail" if fits <= 0 else f"after {fits} more saves it is full"
            message = (
                f"--save {self._folder}: a checkpoint takes {format_bytes(size)}, and "
                f"{format_bytes(disk.free)} are free: {when}. Remedy: make space there, or "
                "--keep-last N at the next start"
            )
            tell(f"> WARNING: {message}", is_error=True)
            self._alarms.send("disk", message)

    def _to_come(self, step: int, kept: int) -> float:
        """Checkpoints by which the folder still grows; one more is there during a save."""
        args, to_come = self._args, math.inf
        if args.train_iters and args.save_interval:
            to_come = math.ceil((args.train_iters - step) / args.save_interval)
        grows = args.save_retain_interval or args.keep_every
        if args.keep_last is not None and not grows:
            to_come = min(to_come, max(args.keep_last + 1 - kept, 1))
        return to_come


def count_fitting(free: int, size: int, *, to_come: float) -> float:
    """How many saves fit a disk; infinite where all that are to come do.

    Args:
        free: Bytes.
        size: Of a checkpoint.
        to_come: Checkpoints until old ones are deleted.
    """
    fits = free // size
    return math.inf if fits >= to_come else fits


def folder_bytes(folder: Path) -> int:
    """Size of the files of a checkpoint."""
    return sum(
        os.path.getsize(Path(root) / name) for root, _, names in os.walk(folder) for name in names
    )


@contextmanager
def disk_watched(args: argparse.Namespace, alarms: Alarms) -> Iterator[Callback]:
    """A callback that watches the disk of ``--save``.

    Args:
        args: Of the run.
        alarms: See `DiskSpace`.
    """
    is_here = args.save and "://" not in args.save
    yield DiskSpace(args, alarms=alarms) if is_here and args.rank == 0 else Callback()
