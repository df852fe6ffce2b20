"""A shard of rewritten documents: a journal while it is made, a file when it is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_JOURNAL = ".journal"


class RewrittenShard:
    """The rewritten documents of one source file.

    Answers come in any order.  Each is appended to a journal, one line with the document's number;
    when all are there they are written in the order of the source, under the shard's name at once.
    A process that is killed leaves the journal, of which a line that is cut off is dropped.

    Args:
        path: Of the complete shard.
        journals: Folder for the journal.
        failures: Of the documents without an answer, written with the shard.
    """

    def __init__(self, path: Path, journals: Path, failures: Path) -> None:
        self.path, self.failures = path, failures
        self._journal = journals / (path.name + _JOURNAL)
        self._failed: dict[int, dict[str, Any]] = {}
        # Where the line of each document begins in the journal.
        self._places: dict[int, tuple[int, int]] = {}
        self._descriptor: int | None = None
        self._end = 0

    @property
    def is_complete(self) -> bool:
        """Whether it was written."""
        return self.path.is_file()

    def open(self) -> None:
        """Read what an earlier process has left, and append to it."""
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        with self._journal.open("rb") as file:
            for line in file:
                number = _read_number(line)
                if number is None:  # of a write that was cut off
                    break
                self._places[number] = (self._end, len(line))
                self._end += len(line)
        os.ftruncate(self._descriptor, self._end)

    def has(self, number: int) -> bool:
        """Whether a document is rewritten."""
        return number in self._places

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Append a document.

        Args:
            number: Of the document in its source, once.
            record: Of the shard's file.
        """
        assert self._descriptor is not None and number not in self._places
        line = json.dumps([number, record], ensure_ascii=False).encode("utf-8") + b"\n"
        _write_all(self._descriptor, line)
        self._places[number] = (self._end, len(line))
        self._end += len(line)

    def add_failure(self, number: int, record: dict[str, Any]) -> None:
        """Note a document without an answer; a later process asks again."""
        self._failed[number] = record

    def finish(self) -> int:
        """Write the complete shard and remove the journal; returns its documents."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        self.failures.unlink(missing_ok=True)  # of a process that was killed right here
        if self._failed:
            failed = [self._failed[number] for number in sorted(self._failed)]
            _replace(self.failures, map(_encode, failed))
        _replace(self.path, self._lines())
        self.close()
        self._journal.unlink()
        return len(self._places)

    def _lines(self) -> Iterator[bytes]:
        """The records in the order of the source."""
        with self._journal.open("rb") as journal:
            for number in sorted(self._places):
                start, length = self._places[number]
                journal.seek(start)
                yield _encode(json.loads(journal.read(length))[1])

    def close(self) -> None:
        """Close the journal; another process may go on with it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file under its name when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def _read_number(line: bytes) -> int | None:
    """The number of a line of the journal; None for one that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        number, record = json.loads(line)
    except (ValueError, TypeError):
        return None
    return number if type(number) is int and isinstance(record, dict) else None


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
