"""How long a rank works in a step: its duration without what it waits for other ranks.

All steps of a synchronous training take equally long on all ranks, because the fast ones wait in
collectives for the slow one.  The work alone tells them apart.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Marks(Protocol):
    """Points in time of the host, or of the device's stream."""

    def now(self) -> Any:
        """Mark this moment."""

    def is_past(self, mark: Any) -> bool:
        """Whether the moment has come."""

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to another one; both are past."""


class HostMarks:
    """Of the host, whose collectives (gloo) block the thread that waits for them."""

    def now(self) -> float:
        """Mark this moment."""
        return time.perf_counter()

    def is_past(self, mark: float) -> bool:
        """Whether the moment has come."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """From one mark to another one."""
        return end - start


class DeviceMarks:
    """CUDA events on the current stream: the host waits for none of them."""

    def now(self) -> torch.cuda.Event:
        """Mark this moment of the stream."""
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def is_past(self, mark: torch.cuda.Event) -> bool:
        """Whether the device has come there."""
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """From one mark to another one; both are past."""
        return start.elapsed_time(end) / 1e3


@dataclass
class _Step:
    start: Any
    end: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)


class WorkClock:
    """Measures the work of this rank in each step.

    Args:
        marks: Of the host or the device.
        window: Steps that are kept.
    """

    def __init__(self, marks: Marks, window: int) -> None:
        self._marks = marks
        self._step: _Step | None = None
        self._ended: deque[_Step] = deque()  # the device may still work on them
        self._work: deque[float] = deque(maxlen=window)

    def start(self) -> None:
        """A step begins."""
        self._collect()
        self._step = _Step(self._marks.now())

    def stop(self) -> None:
        """The step ends."""
        assert self._step is not None, "the step has not begun"
        self._step.end = self._marks.now()
        self._ended.append(self._step)
        self._step = None

    def work(self) -> Sequence[float]:
        """Seconds of work in the last steps, oldest first; without steps that still run."""
        self._collect()
        return tuple(self._work)

    def clear(self) -> None:
        """Forget the steps so far."""
        self._ended.clear()
        self._work.clear()

    def without[**P, R](self, wait: Callable[P, R]) -> Callable[P, R]:
        """A function whose time in a step is not work: it waits for other ranks.

        Args:
            wait: Starts a collective on the current stream, or waits for one.
        """

        @functools.wraps(wait)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            step = self._step
            if step is None:
                return wait(*args, **kwargs)
            start = self._marks.now()
            try:
                return wait(*args, **kwargs)
            finally:
                step.waits.append((start, self._marks.now()))

        return wrapper

    def _collect(self) -> None:
        while self._ended and self._marks.is_past(self._ended[0].end):
            step = self._ended.popleft()
            waited = sum(self._marks.seconds(*wait) for wait in step.waits)
            self._work.append(max(self._marks.seconds(step.start, step.end) - waited, 0.0))
