"""A process of ours: it ends with its launcher, and keeps quiet about optional packages."""

import ctypes
import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings

# What a wrong path or value ends in, before or in a training.
USER_ERRORS = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
_REMEDIES = {
    errno.ENOENT: "name what is there",
    errno.ENOTDIR: "name a folder",
    errno.EISDIR: "name a file",
    errno.EEXIST: "remove it, or name another one",
    errno.EACCES: "let this user read it (write, for a target), or name another one",
    errno.EPERM: "let this user read it (write, for a target), or name another one",
    errno.EROFS: "name a folder on a disk that can be written",
    errno.ENOSPC: "make room, or name a folder on another disk",
    errno.EDQUOT: "make room, or name a folder on another disk",
    errno.ELOOP: "mend the link",
    errno.ENAMETOOLONG: "name a shorter path",
}
LAUNCHER_PID_VARIABLE = "TRINITY_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


def describe_error(error: BaseException) -> str:
    """An error for users: the message, or what the system says of which path, and a remedy."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error) or type(error).__name__
    path = os.fsdecode(error.filename) if not isinstance(error.filename, int) else error.filename
    remedy = _REMEDIES.get(error.errno)
    return f"{path}: {error.strerror}.{f' Remedy: {remedy}.' if remedy else ''}"


def die_with_parent() -> None:
    """End this rank the moment its launcher ends, even if that was killed by SIGKILL.

    A training entry calls this before its slow imports.  Does nothing outside torchrun: there the
    parent may be anything, for example a thread that ends early by design.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_poll_parent, args=(parent,), daemon=True).start()
    # The parent may have ended before the line above.  Children of this rank are not ranks: popped.
    launcher = os.environ.pop(LAUNCHER_PID_VARIABLE, str(parent))
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)


def _poll_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def quiet_import_warnings() -> None:
    """Silence two dozen import-time warnings that apex and Transformer Engine are missing.

    Both are optional.  Call it before anything of Megatron is imported.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)


def quiet_megatron() -> None:
    """Silence Megatron's news too, for commands that are no training."""
    quiet_import_warnings()
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
