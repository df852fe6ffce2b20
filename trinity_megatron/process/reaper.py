"""End what a rank has started, and remove its temporary files, however the rank ended.

A script of its own, without anything but the standard library: a rank starts it first of all as
``python -I -S reaper.py PID FOLDER``, and it waits for the end of that process.  Helper processes
are known by the rank's temporary folder: who was started as a program has it in ``TMPDIR``, and who
was forked has the rank's lock open.  Linux only; elsewhere the files are removed.
"""

import os
import signal
import sys
import time

POLL_SECONDS = 0.25
# Most helpers notice the end themselves, and some have something to write.
GRACE_SECONDS = 2.0
_IGNORED = ("SIGHUP", "SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR1", "SIGUSR2")
# Removes semaphores and shared memory when the last process that uses them has ended.
_TRACKER = b"multiprocessing.resource_tracker"


def main(rank: int, folder: str) -> None:
    """Wait for the end of a process, then clean up after it.

    Args:
        rank: The process, which is the parent of this one.
        folder: Its temporary folder.
    """
    os.setsid()
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.closerange(3, 65536)
    while os.getppid() == rank:
        time.sleep(POLL_SECONDS)
    end_helpers(folder)
    import shutil  # not before: it doubles what this process holds

    shutil.rmtree(folder, ignore_errors=True)


def end_helpers(folder: str) -> None:
    """End the processes that belong to a folder: by themselves, or killed."""
    for spared in (_TRACKER, None):
        if wait_for_end(folder, GRACE_SECONDS):
            return
        for pid in find_helpers(folder):
            if spared is None or spared not in read_bytes(f"/proc/{pid}/cmdline"):
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
    wait_for_end(folder, GRACE_SECONDS)


def wait_for_end(folder: str, seconds: float) -> bool:
    """Whether the processes that belong to a folder end in this time."""
    end = time.monotonic() + seconds
    while find_helpers(folder):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def find_helpers(folder: str) -> list[int]:
    """Processes that belong to a folder."""
    if not os.path.isdir("/proc/self"):
        return []
    found = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in found if pid != os.getpid() and is_helper(pid, folder)]


def is_helper(pid: int, folder: str) -> bool:
    """Whether a living process belongs to a folder."""
    variable = os.fsencode(f"TMPDIR={folder}")
    if variable in read_bytes(f"/proc/{pid}/environ").split(b"\0"):
        return True
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # ended, or another user's
        return False
    for number in numbers:
        try:
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{folder}/"):
                return True
        except OSError:
            continue
    return False


def read_bytes(path: str) -> bytes:
    """A file, or nothing."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
