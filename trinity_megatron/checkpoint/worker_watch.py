"""Watch the background process of asynchronous saves, and report when it has been killed.

Megatron's training process waits for its answers for ever.  A process that was killed, for example
because the machine ran out of memory, answers nothing: the run would stand still.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import connection
from typing import Any

from trinity_megatron.upstream.registry import replaced

_CALLER = "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller"
_SECONDS_BETWEEN_ANSWERS = 0.1
_ENDED = r"the process that writes for rank \d+ was ended by (?:exit code )?\w+"


def watched_worker() -> AbstractContextManager[None]:
    """Let a save fail on all ranks when the process that writes it has been killed."""
    return replaced(f"{_CALLER}._get_process", _watching)


def find_ended_worker(error: BaseException) -> str | None:
    """What the watch has said, where it is the cause of the error of a save.

    Args:
        error: What Megatron raised, with the texts of all ranks that failed.
    """
    seen: BaseException | None = error
    while seen is not None:
        if found := re.search(_ENDED, str(seen)):
            return found[0]
        seen = seen.__cause__ or seen.__context__
    return None


def _watching(get_process: Callable[..., Any]) -> Callable[..., Any]:
    watched: weakref.WeakSet[Any] = weakref.WeakSet()

    def get_watched_process(rank: int, *args: Any, **kwargs: Any) -> Any:
        process = get_process(rank, *args, **kwargs)
        if process not in watched:
            watched.add(process)
            threading.Thread(target=_watch, args=(process, rank), daemon=True).start()
        return process

    return get_watched_process


def _watch(process: Any, rank: int) -> None:
    """Wait for the end of the process; after a sudden one, answer in its place."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    requests = PersistentAsyncCaller._persistent_queue
    copies = PersistentAsyncCaller._persistent_preload_q
    answers = PersistentAsyncCaller._persistent_comp_q
    connection.wait([process.sentinel])
    process.join()
    if process.exitcode == 0 or PersistentAsyncCaller._persistent_queue is not requests:
        return
    _put_error(rank, process.exitcode)
    try:
        answers.put(-1)  # any number: the save is over
    except RuntimeError:  # this process ends too, and starts no thread any more
        return
    # Until the caller is closed: a later save, and the end of the run, wait for the process too.
    while PersistentAsyncCaller._persistent_queue is requests:
        for queue in (copies, requests):
            with contextlib.suppress(ValueError):  # nobody waits
                queue.task_done()
        time.sleep(_SECONDS_BETWEEN_ANSWERS)


def _put_error(rank: int, exitcode: int) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )

    end = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    with contextlib.suppress(OSError, EOFError):  # the process of the queue has ended too
        get_write_results_queue().put(
            RuntimeError(f"the process that writes for rank {rank} was ended by {end}")
        )
