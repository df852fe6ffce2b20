"""A process of ours: how it begins and ends, and that it keeps quiet about optional packages."""

import contextlib
import ctypes
import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from trinity_megatron.errors import UserError

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
# The exit code of a command whose input is at fault.
USER_ERROR = 2
LAUNCHER_PID_VARIABLE = "TRINITY_LAUNCHER_PID"
# A second Ctrl-C sooner than that is the same one, handed on by another process.
SECONDS_BETWEEN_INTERRUPTS = 1.0
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h
# They wait for a command that is not in the background, so they end before it only if killed.
_FOREGROUND_PARENTS = ("sh", "bash", "dash", "zsh", "ksh", "busybox", "make", "timeout")


def enter_rank() -> None:
    """Begin a rank: a training entry calls this before its slow imports.

    The rank ends with its launcher, and what it starts ends with it, however that ends.  It finds
    its place in the world in the variables of torchrun, srun or mpirun, has a temporary folder of
    its own, and as many threads as its share of the cores.  Ends the process with a message if the
    variables contradict each other.
    """
    from trinity_megatron.process.helpers import FOLDER_BYTES, own_helpers
    from trinity_megatron.process.temporary import use_short_temporary_folder
    from trinity_megatron.process.world import join_world

    die_with_parent()
    try:
        use_short_temporary_folder(FOLDER_BYTES)
        own_helpers()
        join_world()
    except UserError as error:
        if os.environ.get("TRINITY_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)


def is_user_error(error: BaseException) -> bool:
    """Whether a user can mend an error: a ``UserError``, or a path that cannot be used."""
    if isinstance(error, OSError) and not isinstance(error, UserError):
        is_of_disk = error.errno in (errno.ENOSPC, errno.EDQUOT)  # write() names no file
        return error.errno in _REMEDIES and (error.filename is not None or is_of_disk)
    return isinstance(error, UserError)


def describe_error(error: BaseException) -> str:
    """An error for users: the message, or what the system says of which path, and a remedy.

    It may hold names and values of anybody's files: what a terminal would follow is escaped.
    """
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1]
        for letter in _describe(error)
    )


def _describe(error: BaseException) -> str:
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error) or type(error).__name__
    path = os.fsdecode(error.filename) if not isinstance(error.filename, int) else error.filename
    remedy = _REMEDIES.get(error.errno)
    return f"{path}: {error.strerror}.{f' Remedy: {remedy}.' if remedy else ''}"


def die_with_parent() -> None:
    """End this rank the moment its launcher ends, even if that was killed by SIGKILL.

    Without torchrun or mpirun the parent may be anything, for example a thread that ends early by
    design: only a shell that waits for this process counts.  srun ends its tasks itself.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # The parent may have ended already.  Children of this rank are not ranks: popped.
        launcher = int(os.environ.pop(LAUNCHER_PID_VARIABLE, os.getppid()))
        if sys.platform == "linux":
            _signal_at_end_of_parent(signal.SIGKILL)
        else:
            _watch_parent(launcher)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGKILL)
    elif "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
        _watch_parent(os.getppid())  # mpirun may have forked it in a thread
    else:
        hang_up_with_shell()


def hang_up_with_shell() -> None:
    """Take the end of the shell that waits for this process as that of a terminal: SIGHUP.

    Only a shell (or make, or timeout) without job control that runs this process in the foreground
    waits so, a script's for example; the end of any other parent means nothing.  Not under nohup.
    """
    if sys.platform != "linux" or os.getpgid(0) != os.getpgid(os.getppid()):
        return
    is_in_background = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if is_in_background or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return
    with contextlib.suppress(OSError):
        if Path(f"/proc/{os.getppid()}/comm").read_text().strip() in _FOREGROUND_PARENTS:
            _signal_at_end_of_parent(signal.SIGHUP)


def end_with_parent() -> None:
    """Ask a process that has just been forked to end, after a save, when its parent ends."""
    if sys.platform == "linux":
        _signal_at_end_of_parent(signal.SIGTERM)


def _signal_at_end_of_parent(signum: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def _watch_parent(parent: int) -> None:
    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=poll, daemon=True).start()


def quiet_import_warnings() -> None:
    """Silence two dozen import-time warnings that apex and Transformer Engine are missing.

    Both are optional.  Call it before anything of Megatron is imported.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"


def quiet_megatron() -> None:
    """Silence Megatron's news too, for commands that are no training."""
    quiet_import_warnings()
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)
