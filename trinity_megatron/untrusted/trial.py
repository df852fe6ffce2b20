"""Trying work apart: in a process that may be ended without harm."""

import faulthandler
import os
import resource
import signal
from collections.abc import Callable

_TOO_MUCH = 77


def try_apart(work: Callable[[], object], *, seconds: int, num_bytes: int) -> str | None:
    """Do something in a process of its own with limits, to see whether it ends.

    Its result and its errors are dropped: what ends within the limits is done again where it is
    needed.

    Args:
        work: What to do; must not wait for other threads, which the process does not have.
        seconds: Processor time.
        num_bytes: Memory beyond what this process has.

    Returns:
        What it needs more of, in words; None if it ends.
    """
    pid = os.fork()
    if not pid:
        _work_and_exit(work, seconds, num_bytes)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"more than {seconds} s of processor time"
    return None if code == 0 else f"more than {num_bytes >> 20} MiB of memory"


def _work_and_exit(work: Callable[[], object], seconds: int, num_bytes: int) -> None:
    code = _TOO_MUCH
    try:
        faulthandler.disable()
        quiet = os.open(os.devnull, os.O_WRONLY)  # a Rust program prints why it aborts
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + num_bytes, mapped + num_bytes))
        work()
        code = 0
    except MemoryError:
        pass
    except BaseException:  # an error that the caller gets too
        code = 0
    finally:
        os._exit(code)
