"""CUDA streams and events of a CPU host: all work runs in order."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class _Stream:
    """A stream on which all work has completed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Event:
    """An event that has completed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    yield


def stand_in_for_streams() -> None:
    """Replace streams and events, by which dispatchers, DDP and pipeline schedules order work."""
    the_stream = _Stream()
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    torch.cuda.stream = _stream_context  # type: ignore[assignment]
    torch.cuda.current_stream = lambda device=None: the_stream  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda device=None: the_stream  # type: ignore[assignment, return-value]
    torch.cuda.set_stream = lambda stream: None  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False  # type: ignore[assignment]
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *args, **kwargs: None)
