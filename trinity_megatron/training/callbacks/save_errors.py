"""A save that fails is one message: the folder, its free space, the checkpoint that stands.

Where the disk is at fault the training goes on (``--on-failed-save continue``), as long as all
ranks know of it: what Megatron raises while shards are written it raises on all of them.  The error
of one rank alone, which the others wait for, ends the run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron.training import get_args
from megatron.training.async_utils import is_empty_async_queue
from torch.distributed.checkpoint.api import CheckpointException

from trinity_megatron.checkpoint.save_worker import write_or_report
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.torch_dist.tracker import iteration_name, read_tracker
from trinity_megatron.checkpoint.worker_watch import find_ended_worker, watched_worker
from trinity_megatron.errors import MachineError, UserError
from trinity_megatron.process.alarms import Alarms
from trinity_megatron.process.screen import tell_once
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.training.callbacks.disk_errors import (
    describe,
    find_reason,
    refuses_a_checkpoint,
    remedy_of,
)
from trinity_megatron.training.first_rank import from_first_rank
from trinity_megatron.training.resume import mend_tracker
from trinity_megatron.upstream.registry import replaced


@contextmanager
def named_save_errors(alarms: Alarms) -> Iterator[Callback]:
    """A callback that explains why a save has failed.

    Args:
        alarms: Are told of a save that the run goes on without.

    Raises:
        UserError: The last save of the run has failed.
    """
    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync"
    saves = SaveErrors(alarms)
    with replaced(f"{writer}.get_save_function_and_args", _with_error_text), watched_worker():
        try:
            yield saves
        except SystemExit:
            saves.refuse_unsaved_end()
            raise
        saves.refuse_unsaved_end()


def _with_error_text(get: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any) -> Any:
        write, preload, arguments = get(self)
        return (None if write is None else partial(write_or_report, write)), preload, arguments

    return wrapper


class SaveErrors(Callback):
    """Keeps the saves that have begun and may not be complete.

    Args:
        alarms: See `named_save_errors`.
    """

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms
        self._begun: list[tuple[int, Path]] = []
        # Of the latest save, if it has failed: its step, and what is said.
        self._unsaved: tuple[int, str] | None = None

    def should_save(self, iteration: int, *, non_persistent: bool = False) -> bool:
        """Whether the step is not the one that was loaded, and the disk can hold it."""
        args = get_args()
        is_loaded = iteration == args.iteration and not args.finetune
        if is_loaded and args.load and Path(args.load).resolve() == Path(args.save).resolve():
            tell_once(f"> step {iteration} is saved already")
            return False
        folder = save_folder(non_persistent)
        is_one_disk = not non_persistent or args.non_persistent_ckpt_type == "global"
        if args.on_failed_save == "fail" or not is_one_disk or "://" in str(folder):
            return True
        message = from_first_rank(partial(_refusal, iteration, folder))
        if message is not None:
            self._continue_without_save(iteration, message)
        return message is None

    def on_checkpoint_save_start(
        self, iteration: int, model: Any, optimizer: Any, *, non_persistent: bool
    ) -> None:
        """Record where the step is saved."""
        if not get_args().async_save:
            self._begun.clear()
        self._begun.append((iteration, save_folder(non_persistent)))

    def on_checkpoint_save_end(self, iteration: int) -> None:
        """Forget what has failed before, once a later step is saved."""
        self.on_checkpoint_finalize_end()

    def on_checkpoint_finalize_end(self) -> None:
        """Forget what has failed before, once a later step is saved."""
        if not self._begun or not is_empty_async_queue():
            return
        del self._begun[:-1]
        if self._unsaved and self._begun[0][0] > self._unsaved[0]:
            self._unsaved = None

    def on_checkpoint_error(self, error: BaseException) -> bool:
        """Go on without the save, or raise a better error.

        Raises:
            UserError: The disk is at fault, and the run cannot go on or shall not: names the
                folder, the free space and the last complete checkpoint.
            MachineError: The process that writes was killed, and whoever starts the run again may
                save; or this is not rank 0, and only that knows.
        """
        if not self._begun:
            return False
        args = get_args()
        if args.on_failed_save == "fail" or not isinstance(error, CheckpointException):
            self._raise_better(error)
            return False
        step, message = from_first_rank(lambda: self._explain_disk(error))
        if message is None:
            self._raise_better(error)
            return False
        self._begun = [begun for begun in self._begun if begun[0] != step]
        self._continue_without_save(step, message)
        return True

    def refuse_unsaved_end(self) -> None:
        """Refuse to end as if all were well after a save that has failed; all ranks alike.

        Raises:
            UserError: The last save has failed.
        """
        if self._unsaved is not None:
            raise UserError(self._unsaved[1])

    def _continue_without_save(self, step: int, message: str) -> None:
        self._unsaved = step, message
        if step < get_args().train_iters:  # else the run ends, with this message
            tell_once(f"> WARNING: {message} The training goes on (--on-failed-save continue)")
            self._alarms.send_once("failed save", message)

    def _explain_disk(self, error: BaseException) -> tuple[int, str | None]:
        """The step whose save has failed, and what to say; None where it is not the disk."""
        step, folder = self._incomplete()[0]
        if find_ended_worker(error) or (number := find_reason(error, folder)) is None:
            return step, None
        _discard([(step, folder)])
        return step, _describe_failure(step, folder, number)

    def _raise_better(self, error: BaseException) -> None:
        args, begun = get_args(), self._incomplete()
        step, folder = begun[0]
        if ended := find_ended_worker(error):
            _discard(begun)
            raise MachineError(
                f"the save of step {step} to {folder} failed: {ended}. {_what_stands(folder)}. "
                "Remedy: look whether the machine ran out of memory, or save without --async-save; "
                "the same command then goes on from the latest checkpoint."
            ) from error
        number = find_reason(error, folder)
        if number is not None:
            _discard(begun)
            raise UserError(_describe_failure(step, folder, number)) from error
        if args.rank and isinstance(error, CheckpointException):
            raise MachineError(f"the save of step {step} failed; rank 0 says why") from error

    def _incomplete(self) -> list[tuple[int, Path]]:
        begun = [(step, folder) for step, folder in self._begun if step > _latest(folder)]
        return begun or self._begun[-1:]


def _discard(begun: list[tuple[int, Path]]) -> None:
    """Remove what failed saves have left, so that there is space for what follows."""
    args = get_args()
    if args.rank != 0 or args.ckpt_format != "torch_dist":
        return
    for step, folder in begun:
        path = folder / iteration_name(step)
        try:
            TorchDistReader(path)
        except ValueError:
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError, ValueError):
        mend_tracker(begun[0][1])


def _refusal(step: int, folder: Path) -> str | None:
    """Why the disk cannot hold the save of a step; None if it seems to."""
    number = refuses_a_checkpoint(get_args(), folder)
    return None if number is None else _describe_failure(step, folder, number)


def _describe_failure(step: int, folder: Path, number: int) -> str:
    return (
        f"the save of step {step} to {folder} failed: {describe(get_args(), folder, number)}. "
        f"{_what_stands(folder)}. Remedy: {remedy_of(number)}; the same command then goes on from "
        "the latest checkpoint."
    )


def _what_stands(folder: Path) -> str:
    latest = _latest(folder)
    return f"The checkpoint of step {latest} stands" if latest else "None stands"


def save_folder(is_passing: bool) -> Path:
    """Where Megatron saves, lasting or non-persistent checkpoints."""
    args = get_args()
    if is_passing and args.non_persistent_ckpt_type == "local":
        return Path(args.non_persistent_local_ckpt_dir)
    if is_passing:
        return Path(args.non_persistent_global_ckpt_dir or Path(args.save) / "non_persistent")
    return Path(args.save)


def _latest(folder: Path) -> int:
    """What the tracker names, 0 if nothing."""
    try:
        word = read_tracker(folder) or ""
    except OSError:
        return 0
    return int(word) if word.isdigit() else 0
