"""The helper processes of a rank, and its temporary files: they end with it, and no sooner."""

import contextlib
import fcntl
import getpass
import multiprocessing.popen_fork
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from trinity_megatron.process import reaper

_FOLDER_PREFIX = "trinity_megatron_"
_LOCK_NAME = ".rank"
_LAST = -1000
# What the folder adds to the path of a helper's socket.
FOLDER_BYTES = len(f"{_FOLDER_PREFIX}12345678/")
# What a group of processes gets from a terminal or a supervisor, and what asks a run to save.
_GROUP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def own_helpers() -> None:
    """Let the processes that this one starts end with it, and no sooner.

    The temporary folder becomes one of this process alone.  A reaper waits for the end of this
    process, then ends what is left of its helpers and removes the folder.  A helper is left alone
    by the signals that ask for a save: without the process that gathers the results of its writers
    a checkpoint cannot be saved.
    """
    base = tempfile.gettempdir()
    _remove_leftovers(base)
    folder = tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=base)
    _lock_folder(folder)
    _start_reaper(folder)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    # Later than what multiprocessing does at the end, which still uses the folder.
    multiprocessing.util.Finalize(None, remove, exitpriority=_LAST)
    if os.environ.get("TORCHDYNAMO_DISABLE") != "1":  # otherwise nothing is compiled
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiler_cache(base))
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    _shield_helpers()


def _compiler_cache(base: str) -> str:
    """Where torch keeps what it has compiled, for later runs too.

    Source: torch/_inductor/runtime/cache_dir_utils.py, default_cache_dir.
    """
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        user = f"uid_{os.getuid()}"
    return os.path.join(base, "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def _lock_folder(folder: str) -> None:
    """Keep a lock that says who uses the folder; forked children have it open too."""
    hidden = os.path.join(folder, ".new")
    descriptor = os.open(hidden, os.O_CREAT | os.O_RDWR, 0o600)
    os.write(descriptor, os.uname().nodename.encode())
    with contextlib.suppress(OSError):  # a filesystem without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(hidden, os.path.join(folder, _LOCK_NAME))


def _remove_leftovers(base: str) -> None:
    """Remove folders of ranks that were killed together with their reapers, as a job's end does.

    Not those of other machines, which a shared filesystem may show: it may not show their locks.
    """
    host = os.uname().nodename
    for lock in Path(base).glob(f"{_FOLDER_PREFIX}*/{_LOCK_NAME}"):
        with contextlib.suppress(OSError), lock.open("r+") as file:
            if file.read() == host:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)


def _start_reaper(folder: str) -> None:
    command = [sys.executable, "-I", "-S", reaper.__file__, str(os.getpid()), folder]
    # Who reads the output of this process shall not wait for the reaper.
    silence = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    os.posix_spawn(sys.executable, command, os.environ, file_actions=silence)


def _block_group_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)


def _shield_helpers() -> None:
    """Block the signals of a group in the helper processes of multiprocessing.

    A helper inherits the mask of the thread that starts it.  As SIGTERM no longer ends it,
    ``Process.terminate()`` sends SIGKILL.
    """
    start = multiprocessing.util.spawnv_passfds

    def start_shielded(*args: Any) -> int:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        try:
            return start(*args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    multiprocessing.util.spawnv_passfds = start_shielded  # type: ignore[assignment]
    popen = multiprocessing.popen_fork.Popen  # that of spawn and forkserver too
    popen.terminate = popen.kill  # type: ignore[method-assign]
    multiprocessing.util.register_after_fork(_block_group_signals, lambda block: block())
