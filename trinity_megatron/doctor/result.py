"""What a part of the suite reports."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["passed", "failed", "skipped"]


class SuiteError(RuntimeError):
    """A part cannot give its result; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What the parts are run with.

    Attributes:
        device: Where everything runs.
        out: Folder for data, runs and logs.
    """

    device: Literal["cuda", "cpu"]
    out: Path

    @property
    def on_gpu(self) -> bool:
        """Whether the parts run on a CUDA device."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Table:
    """A table of the report; every row has an entry for each column."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass
class PartResult:
    """Result of a part.

    Attributes:
        name: The part.
        status: ``skipped`` if nothing of it ran.
        reason: Why it was skipped or failed.
        skipped: What was left out of a part that ran, each with the reason.
        tables: Figures, in order.
        notes: Sentences below the tables.
        seconds: Wall-clock time.
    """

    name: str
    status: Status = "passed"
    reason: str = ""
    skipped: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def fail(self, reason: str) -> None:
        """Mark as failed; the first reasons are kept."""
        self.status = "failed"
        self.reason = f"{self.reason}; {reason}" if self.reason else reason

    def close(self) -> None:
        """Call it skipped, with the reasons, if nothing of it ran: what has no figures."""
        if self.status == "passed" and not any(table.rows for table in self.tables):
            self.status = "skipped"
            self.reason = "; ".join(self.skipped) or "nothing of it ran"
            self.skipped = []


class Deadline:
    """Wall-clock time that a part may take.

    Args:
        seconds: From now on.
    """

    # Importing Megatron alone takes about ten seconds.
    _SHORTEST_RUN, _MARGIN = 15.0, 1.3

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._longest_run = 0.0

    def remaining(self) -> float:
        """Seconds left, at least 0."""
        return max(self._end - time.monotonic(), 0.0)

    def has_time(self) -> bool:
        """Whether a run as long as the longest so far would end in time, with a margin."""
        return self.remaining() > max(self._SHORTEST_RUN, self._MARGIN * self._longest_run)

    def observe_run(self, seconds: float) -> None:
        """Remember how long a run took."""
        self._longest_run = max(self._longest_run, seconds)
