"""A save that fails is one error: the folder, its free space, the checkpoint that stands."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException

from trinity_megatron.checkpoint.save_worker import write_or_say
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.torch_dist.tracker import iteration_name, read_tracker
from trinity_megatron.checkpoint.worker_watch import find_ended_worker, watched_worker
from trinity_megatron.errors import MachineError, UserError
from trinity_megatron.process.screen import tell_once
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.training.preflight import checkpoint_bytes, format_bytes
from trinity_megatron.training.resume import mend_tracker
from trinity_megatron.upstream.registry import replaced

_REMEDIES = {
    errno.ENOSPC: "make space there",
    errno.EDQUOT: "make space there, or raise the quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "mount it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "bring the folder back",
    errno.EIO: "mend the disk",
    errno.ESTALE: "mount it again",
    errno.ENOTCONN: "mount it again",
}
_OF_A_PATH = (errno.ENOENT, errno.EACCES, errno.EPERM)
_PROBE_BYTES = 1 << 20


@contextmanager
def named_save_errors() -> Iterator[Callback]:
    """A callback that explains why a save has failed."""
    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync"
    with replaced(f"{writer}.get_save_function_and_args", _with_error_text), watched_worker():
        yield SaveErrors()


def _with_error_text(get: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any) -> Any:
        write, preload, arguments = get(self)
        return (None if write is None else partial(write_or_say, write)), preload, arguments

    return wrapper


class SaveErrors(Callback):
    """Keeps the saves that have begun and may not be complete."""

    def __init__(self) -> None:
        self._begun: list[tuple[int, Path]] = []

    def should_save(self, iteration: int) -> bool:
        """Whether the step is not the one that was loaded from the same folder."""
        args = get_args()
        is_loaded = iteration == args.iteration and not args.finetune
        if is_loaded and args.load and Path(args.load).resolve() == Path(args.save).resolve():
            tell_once(f"> step {iteration} is saved already")
            return False
        return True

    def on_checkpoint_save_start(
        self, iteration: int, model: Any, optimizer: Any, *, non_persistent: bool
    ) -> None:
        """Record where the step is saved."""
        args = get_args()
        if not args.async_save:
            self._begun.clear()
        self._begun.append((iteration, save_folder(args, non_persistent)))

    def on_checkpoint_error(self, error: BaseException) -> None:
        """Raise a ``UserError`` where the disk is at fault.

        Raises:
            UserError: Names the folder, the free space and the last complete checkpoint.
            MachineError: The process that writes was killed, and whoever starts the run again may
                save; or this is not rank 0, and only that knows.
        """
        begun = [(step, folder) for step, folder in self._begun if step > _latest(folder)]
        if not (begun := begun or self._begun[-1:]):
            return
        args, (step, folder) = get_args(), begun[0]
        failure = find_failure(args, error, folder)
        if failure is None and args.rank and isinstance(error, CheckpointException):
            raise MachineError(f"the save of step {step} failed; rank 0 says why") from error
        if failure is None:
            return
        kind, reason, remedy = failure
        if args.rank == 0 and args.ckpt_format == "torch_dist":
            discard_incomplete([folder / iteration_name(step) for step, folder in begun])
            with contextlib.suppress(OSError, ValueError):
                mend_tracker(folder)
        latest = _latest(folder)
        stands = f"The checkpoint of step {latest} stands" if latest else "None stands"
        raise kind(
            f"the save of step {step} to {folder} failed: {reason}. {stands}. Remedy: {remedy}; "
            "the same command then goes on from the latest checkpoint."
        ) from error


def save_folder(args: argparse.Namespace, is_passing: bool) -> Path:
    """Where Megatron saves, lasting or non-persistent checkpoints."""
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


def find_failure(
    args: argparse.Namespace, error: BaseException, folder: Path
) -> tuple[type[UserError | MachineError], str, str] | None:
    """What is at fault and what the user can do; None where it is neither disk nor memory."""
    if ended := find_ended_worker(error):
        remedy = "look whether the machine ran out of memory, or save without --async-save"
        return MachineError, ended, remedy
    number = find_reason(error, folder)
    if number is None:
        return None
    return UserError, describe(args, folder, number), _REMEDIES.get(number, "mend that")


def find_reason(error: BaseException, folder: Path) -> int | None:
    """The number of the operating system's error behind the error of a save.

    Args:
        error: What Megatron raised; on rank 0 its text has that of the ranks that failed.
        folder: That was written to.

    Returns:
        None where the disk is not at fault.
    """
    seen: BaseException | None = error
    while seen is not None:
        numbers = [seen.errno] if isinstance(seen, OSError) else []
        numbers += [int(number) for number in re.findall(r"\[Errno (\d+)\]", str(seen))]
        # A path that is gone or closed may be another than this folder.
        is_elsewhere = str(folder) not in str(seen)
        for number in numbers:
            if number in _REMEDIES and not (number in _OF_A_PATH and is_elsewhere):
                return number
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, OSError | RuntimeError | CheckpointException):
        return probe(folder)  # torch's own writer has no numbers
    return None


def explain_disk_error(error: OSError) -> str | None:
    """What a full or broken disk says anywhere else in a run; None if the disk is not at fault."""
    if error.errno not in _REMEDIES or error.errno in _OF_A_PATH:
        return None
    return (
        f"{error.filename or 'a file'} cannot be written or read: {error.strerror}. Remedy: "
        f"{_REMEDIES[error.errno]}; the same command then goes on from the latest checkpoint."
    )


def probe(folder: Path, size: int = _PROBE_BYTES) -> int | None:
    """Number of the error that a write to a folder ends with; None if it succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def discard_incomplete(checkpoints: list[Path]) -> None:
    """Remove what a failed save has left, so that there is space for what follows."""
    for path in checkpoints:
        try:
            TorchDistReader(path)
        except ValueError:
            shutil.rmtree(path, ignore_errors=True)


def describe(args: argparse.Namespace, folder: Path, number: int) -> str:
    """What the disk says, and the space that there is and would have to be.

    Args:
        args: Of the run.
        folder: Where the save went.
        number: Of the error.
    """
    free = ""
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(folder)
        free = f"{format_bytes(disk.free)} of {format_bytes(disk.total)} are free there, and "
    return (
        f"{os.strerror(number)}. {free}a checkpoint takes about "
        f"{format_bytes(checkpoint_bytes(args))}"
    )
