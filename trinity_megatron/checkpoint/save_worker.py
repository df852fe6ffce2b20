"""Workers that write the shards of a checkpoint; the errors they meet reach the training process.

Megatron's writer passes on the type of an error without its text, and one of its threads that fails
ends the writing process without a word.
"""

import queue
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from torch import Tensor

from trinity_megatron.upstream.registry import replaced

_WRITER_MODULE = "megatron.core.dist_checkpointing.strategies.filesystem_async"
_WRITE = f"{_WRITER_MODULE}:FileSystemWriterAsync.write_preloaded_data"


def results_in_this_process() -> AbstractContextManager[None]:
    """Let a synchronous save hand over its results in this process.

    Megatron's queue lives in a helper process of every rank, which imports torch before the first
    save: some seconds and half a GiB.  An asynchronous save, which writes in another process, needs
    it.
    """
    return replaced(
        f"{_WRITER_MODULE}:get_write_results_queue", lambda _: lambda *_args: queue.SimpleQueue()
    )


def copies_for_async_saves(is_async: Callable[[], bool]) -> AbstractContextManager[None]:
    """Let an asynchronous save write copies of what lies on the host.

    Megatron copies what is on a device, and of the host's tensors those that are a part of a
    storage; whole ones it would share with the process that writes, while the next steps go on.

    Args:
        is_async: Whether the run saves so; asked at each save.
    """

    def with_copies(prepare: Callable[..., None]) -> Callable[..., None]:
        @wraps(prepare)
        def wrapper(self: Any, plan: Any, planner: Any) -> None:
            prepare(self, plan, _Copies(planner) if is_async() else planner)

        return wrapper

    return replaced(f"{_WRITER_MODULE}:FileSystemWriterAsync.prepare_write_data", with_copies)


class _Copies:
    """A planner whose tensors the next steps of the training do not change."""

    def __init__(self, planner: Any) -> None:
        self._planner = planner

    def resolve_data(self, item: Any) -> Any:
        data = self._planner.resolve_data(item)
        is_on_host = isinstance(data, Tensor) and data.device.type == "cpu"
        return data.detach().clone() if is_on_host and not _is_part(data) else data


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor is smaller than its storage: Megatron copies it."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes


class _Results:
    """Takes the place of the queue."""

    latest: Any = None

    def put(self, results: Any) -> None:
        self.latest = results


class _Outputs:
    """The queue of a thread's output, which notes its error before anyone can take it out."""

    def __init__(self, queue: Any, note: Callable[[Any], None]) -> None:
        self._queue = queue
        self._note = note

    def put(self, output: Any) -> None:
        self._note(output)
        self._queue.put(output)


def write_or_report(
    write: Callable[..., None], rank: int, buckets: Sequence[Any], queue: Any
) -> None:
    """Run Megatron's ``write_preloaded_data_multithread``; an error goes into the queue as it is.

    Args:
        write: The function, with its first arguments bound.
        rank: Of the training process.
        buckets: What to write.
        queue: Gets the results by bucket, or an exception with the text of the first error.
    """
    failures: list[Exception] = []

    def note(output: Any) -> None:
        if isinstance(output[1], Exception):
            failures.append(output[1])

    def noting(write_one: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kwargs["results_queue"] is not None:
                kwargs["results_queue"] = _Outputs(kwargs["results_queue"], note)
                return write_one(*args, **kwargs)
            output = write_one(*args, **kwargs)
            note(output)
            return output

        return wrapper

    results = _Results()
    with replaced(_WRITE, noting):
        try:
            write(rank, buckets, results)
        except Exception as error:
            failures.append(error)
    queue.put(RuntimeError(str(failures[0])) if failures else results.latest)
