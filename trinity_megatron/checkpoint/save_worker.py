"""What writes the shards of a checkpoint, in this process or in one of its own, keeps its error.

Megatron's writer passes on the type of an error without its text, and one of its threads that fails
ends the writing process without a word.
"""

from collections.abc import Callable, Sequence
from typing import Any


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


def write_or_say(write: Callable[..., None], rank: int, buckets: Sequence[Any], queue: Any) -> None:
    """Run Megatron's ``write_preloaded_data_multithread``; an error goes into the queue as it is.

    Args:
        write: The function, with its first arguments bound.
        rank: Of the training process.
        buckets: What to write.
        queue: Gets the results by bucket, or an exception with the text of the first error.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = vars(FileSystemWriterAsync)["write_preloaded_data"]
    failures: list[Exception] = []

    def note(output: Any) -> None:
        if isinstance(output[1], Exception):
            failures.append(output[1])

    def noting(*args: Any, **kwargs: Any) -> Any:
        if kwargs["results_queue"] is not None:
            return original.__func__(
                *args, **{**kwargs, "results_queue": _Outputs(kwargs["results_queue"], note)}
            )
        output = original.__func__(*args, **kwargs)
        note(output)
        return output

    results = _Results()
    FileSystemWriterAsync.write_preloaded_data = staticmethod(noting)
    try:
        write(rank, buckets, results)
    except Exception as error:
        failures.append(error)
    finally:
        FileSystemWriterAsync.write_preloaded_data = original
    queue.put(RuntimeError(str(failures[0])) if failures else results.latest)
