"""TensorBoard's event files of a run that goes on when they cannot be written."""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import suppress
from typing import Any

from tensorboard.summary.writer.record_writer import RecordWriter

from trinity_megatron.process.screen import tell

_RETRY_SECONDS = 10.0
# What is kept until the file can be written again: some thousand steps.
_MOST_KEPT_BYTES = 64 * 2**20
# Length, its checksum, and that of the data.  Source: TensorFlow's record format.
_FRAME_BYTES = 8 + 4 + 4


class ForgivingRecordWriter(RecordWriter):
    """Writes records; those that a disk refuses are kept, and written when it takes them.

    The error would reach the training from the thread that writes, at some later step.  A record
    after a torn one cannot be read, so the file is cut behind the last whole one first.

    Args:
        writer: The file.
    """

    def __init__(self, writer: Any) -> None:
        super().__init__(writer)
        self._name = os.fsdecode(writer.filename)
        self._whole_bytes = 0
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._failed_at: float | None = None

    def write(self, data: bytes) -> None:
        """Write a record, or keep it."""
        if self._kept_bytes + len(data) <= _MOST_KEPT_BYTES:
            self._kept.append(data)
            self._kept_bytes += len(data)
        if self._failed_at is None or time.monotonic() - self._failed_at > _RETRY_SECONDS:
            self._write_kept()

    def flush(self) -> None:
        """Hand what is written to the operating system."""
        if self._failed_at is None:
            with suppress(OSError):
                super().flush()

    def close(self) -> None:
        """Write what is kept, if that goes now, and end the file."""
        self._write_kept()
        with suppress(OSError):
            super().close()

    def _write_kept(self) -> None:
        try:
            if self._failed_at is not None and os.path.exists(self._name):
                os.truncate(self._name, self._whole_bytes)
            while self._kept:
                super().write(self._kept[0])
                data = self._kept.popleft()
                self._kept_bytes -= len(data)
                self._whole_bytes += len(data) + _FRAME_BYTES
        except OSError as error:
            if self._failed_at is None:
                tell(
                    f"WARNING: TensorBoard: {self._name} cannot be written: "
                    f"{error.strerror or error}. The training goes on, and what it logs is kept "
                    "in memory; the file is tried again.",
                    is_error=True,
                )
            self._failed_at = time.monotonic()
            return
        if self._failed_at is not None:
            self._failed_at = None
            tell(f"> TensorBoard: {self._name} is written again")
