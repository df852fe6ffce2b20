"""Cores of a helper process whose parent has its threads bound to one core each."""

import contextlib
import os
from pathlib import Path


def inherit_cores_of_parent() -> None:
    """Let this process run on every core that a thread of its parent may run on.

    A process inherits the cores of the thread that starts it: under ``OMP_PROC_BIND`` the first
    one, where it would compete with the training for that core alone.
    """
    cores: set[int] = set()
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        for task in Path(f"/proc/{os.getppid()}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that has ended meanwhile
                cores |= os.sched_getaffinity(int(task.name))
        os.sched_setaffinity(0, cores)
