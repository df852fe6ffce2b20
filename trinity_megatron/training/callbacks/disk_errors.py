"""What a disk says where it refuses to be written, and what the user can do."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from trinity_megatron.training.preflight import checkpoint_bytes, format_bytes

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
        f"{remedy_of(error.errno)}; the same command then goes on from the latest checkpoint."
    )


def refuses_a_checkpoint(args: argparse.Namespace, folder: Path) -> int | None:
    """Number of the error that a save would end with; None if nothing is known against it.

    Args:
        args: Of the run.
        folder: Where the save would go; may not be there yet.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(existing)
        if disk.total and disk.free < checkpoint_bytes(args):  # some network filesystems say 0
            return errno.ENOSPC
    return probe(existing)


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


def remedy_of(number: int) -> str:
    """What a user can do about an error of the operating system."""
    return _REMEDIES.get(number, "mend that")


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
