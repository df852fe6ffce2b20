"""The file in which a run says where it is, for ``trinity-megatron supervise`` and monitors."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HEARTBEAT_NAME = "heartbeat.json"
# A line of one length, written at once: no reader sees half of it, and nothing is renamed.
_LINE_BYTES = 128


@dataclass(frozen=True)
class Heartbeat:
    """Where a run is.

    Attributes:
        start: The step that this start has begun from.
        step: The step that it is in.
        saved: The last step that is saved; 0 for none.
        time: Unix time of the beginning of the step.
    """

    start: int
    step: int
    saved: int
    time: float


class HeartbeatFile:
    """Written by one rank in every step; a disk that cannot be written does not end the run.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(folder / HEARTBEAT_NAME, os.O_WRONLY | os.O_CREAT, 0o644)

    def write(self, *, start: int, step: int, saved: int) -> None:
        """Say that a step begins.

        Args:
            start: The step that this start has begun from.
            step: Its number.
            saved: The last step that is saved.
        """
        if self._file is None:
            return
        beat = Heartbeat(start, step, saved, round(time.time(), 3))
        line = json.dumps(asdict(beat)).ljust(_LINE_BYTES - 1) + "\n"
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.encode(), 0)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_heartbeat(folder: Path) -> Heartbeat | None:
    """What a run has said last; None if it has said nothing.

    Args:
        folder: Of the run.
    """
    try:
        return Heartbeat(**json.loads((folder / HEARTBEAT_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None
