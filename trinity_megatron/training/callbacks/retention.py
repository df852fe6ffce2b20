"""``--keep-last``, ``--keep-every``: delete the older checkpoints of a run.

Rank 0 does it in the background, after the tracker file names the new one.  A check of a checkpoint
reads its ``.metadata`` and the sizes of its files.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.training.async_utils import is_empty_async_queue

from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.torch_dist.tracker import iteration_name, read_tracker
from trinity_megatron.data.mixture.quantities import parse_tokens
from trinity_megatron.training.arguments.schedule import BatchSizes
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.upstream.registry import replaced

logger = logging.getLogger(__name__)

# What is being deleted; no reader of checkpoints looks at such a name.
_DOOMED = "deleting_"


@contextmanager
def old_checkpoints_deleted(args: argparse.Namespace) -> Iterator[Callback]:
    """A callback that deletes old checkpoints after each save; nothing without the flag.

    Args:
        args: Of the run.
    """
    if args.keep_last is None:
        yield Callback()
        return
    # Megatron's own deletion knows --save-retain-interval only, and keeps one more.
    delete = "megatron.training.checkpointing:_async_delete_checkpoint_impl"
    with replaced(delete, lambda _: _leave):
        if args.rank != 0:
            yield Callback()
            return
        with Retention(args) as retention:
            yield retention


def _leave(*args: Any, **kwargs: Any) -> None:
    """Delete nothing, in the place of Megatron's function."""


class Retention(Callback):
    """Deletes the older checkpoints of a run; a context manager, whose end waits for it.

    Args:
        args: Of the run.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._folder = Path(args.save)
        self._keep, self._interval = args.keep_last, args.save_retain_interval
        self._period_of = token_periods(args)
        self._worker = ThreadPoolExecutor(1, "keep-last")
        self._latest = read_tracker(self._folder)
        self._is_saving = self._has_failed = False

    def __enter__(self) -> Retention:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown()

    def on_checkpoint_save_end(self, iteration: int) -> None:
        """Delete once the save is complete."""
        self._is_saving = True
        self.on_checkpoint_finalize_end()

    def on_checkpoint_finalize_end(self) -> None:
        """Delete old checkpoints if a save has become complete."""
        if not self._is_saving or not is_empty_async_queue():
            return
        self._is_saving = False
        latest = read_tracker(self._folder)
        if latest != self._latest:
            self._latest = latest
            self._worker.submit(self._delete)

    def _delete(self) -> None:
        try:
            delete_old(self._folder, self._keep, self._interval, self._period_of)
        except Exception as error:  # nothing of it may end the training
            if not self._has_failed:
                self._has_failed = True
                logger.warning(
                    "--keep-last: old checkpoints in %s cannot be deleted (%s); the training goes "
                    "on, and the disk fills up.",
                    self._folder,
                    error,
                )


def token_periods(args: argparse.Namespace) -> Callable[[int], int]:
    """By which multiple of ``--keep-every`` a step is past; always 0 without the flag.

    Args:
        args: Of the run.
    """
    if args.keep_every is None:
        return lambda step: 0
    batches, tokens = BatchSizes.of(args), parse_tokens(args.keep_every)
    return lambda step: batches.samples_after(step) * args.seq_length // tokens


def delete_old(
    folder: Path,
    keep: int,
    interval: int | None = None,
    period_of: Callable[[int], int] = lambda step: 0,
) -> list[int]:
    """Delete the iterations before the newest complete ones.

    The one that the tracker file names, those after it, releases and links are never deleted.  A
    folder is renamed first: half of it does not count as a checkpoint.

    Args:
        folder: What ``--save`` was.
        keep: Number of complete checkpoints to keep.
        interval: Multiples of it are kept too.
        period_of: Period of an iteration; the first one of each period from 1 on is kept too.

    Returns:
        The iterations that were deleted.

    Raises:
        OSError: Something cannot be deleted; the rest is.
    """
    old = choose_old(folder, keep, interval, period_of)
    for number in old:
        (folder / iteration_name(number)).rename(folder / f"{_DOOMED}{iteration_name(number)}")
    failures: list[OSError] = []
    for path in folder.glob(f"{_DOOMED}iter_*"):  # of an earlier start, which was killed, too
        try:
            shutil.rmtree(path)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return old


def choose_old(
    folder: Path,
    keep: int,
    interval: int | None = None,
    period_of: Callable[[int], int] = lambda step: 0,
) -> list[int]:
    """The iterations that :func:`delete_old` deletes."""
    latest = read_tracker(folder) or ""
    if not latest.isdigit():
        return []
    found = (path for path in folder.glob("iter_*") if path.is_dir() and not path.is_symlink())
    numbers = (int(path.name[5:]) for path in found if path.name[5:].isdigit())
    past = sorted((number for number in numbers if number <= int(latest)), reverse=True)
    complete = (number for number in past if _is_complete(folder / iteration_name(number)))
    kept = [number for number, _ in zip(complete, range(keep), strict=False)]
    if len(kept) < keep:
        return []

    def whole(number: int) -> bool:
        return _is_complete(folder / iteration_name(number))

    for_ever = {int(latest), *first_of_periods(past, period_of, whole)}
    for_ever |= {number for number in past if interval and number % interval == 0}
    return [number for number in past if number < kept[-1] and number not in for_ever]


def first_of_periods(
    numbers: Iterable[int],
    period_of: Callable[[int], int],
    is_complete: Callable[[int], bool] = lambda number: True,
) -> set[int]:
    """The first complete iteration of each period from 1 on."""
    found: set[int] = set()
    period = 0
    for number in sorted(numbers):
        if period_of(number) > period and is_complete(number):
            found.add(number)
            period = period_of(number)
    return found


def _is_complete(folder: Path) -> bool:
    try:
        return TorchDistReader(folder).folder == folder
    except ValueError:
        return False
