"""Threads that read the items of a checkpoint ahead and compare their checksums."""

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StorageInfo

from trinity_megatron.checkpoint.integrity.checks import Checks, check_stays_inside
from trinity_megatron.checkpoint.integrity.checksums import (
    Window,
    check_records,
    crc32,
    get_checksum,
)
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint

_NUM_THREADS = 2
# Most bytes read ahead, unless one item is larger.
_AHEAD_BYTES = 256 * 2**20
# Bytes per read: the checksum is computed while they are in the processor's cache.
_PIECE_BYTES = 2**20
_COPY_AGAIN = "Remedy: copy the file again."


class ReadAhead:
    """Reads the items of a checkpoint in threads and verifies their checksums.

    Args:
        folder: Folder of the checkpoint.
        infos: Locations of the items, in the order in which :meth:`take` will be called.
        checks: Settings of the integrity checks.
    """

    def __init__(self, folder: Path, infos: Iterable[_StorageInfo], checks: Checks) -> None:
        self._folder, self._checks = folder, checks
        self._waiting = deque(infos)
        self._running: deque[tuple[_StorageInfo, Future[tuple[bytearray, memoryview]]]] = deque()
        self._files: dict[str, int] = {}
        self._free: list[bytearray] = []
        self._taken: bytearray | None = None
        self._last: _StorageInfo | None = None
        self._pool = ThreadPoolExecutor(_NUM_THREADS) if len(self._waiting) > 1 else None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)

    def take(self, info: _StorageInfo) -> Window:
        """Return an item; its memory is valid until the next call.

        Raises:
            BadCheckpoint: The item is truncated or its checksum is wrong.
        """
        if self._taken is not None:
            self._free.append(self._taken)
        self._last = info
        self._start()
        if self._running and self._running[0][0] is info:
            self._taken, data = self._running.popleft()[1].result()
        else:
            self._taken, data = self._read(info, self._open(info), self._get_buffer(info.length))
        return Window(data)

    def locate(self, error: BadCheckpoint) -> str:
        """The message of an error, prefixed with the file of the item taken last."""
        if self._last is None or self._name(self._last) in str(error):
            return str(error)
        return f"{self._name(self._last)}: {error}"

    def _start(self) -> None:
        """Start to read the next items."""
        pending = sum(info.length for info, _ in self._running)
        while self._pool is not None and self._waiting and len(self._running) < 2 * _NUM_THREADS:
            pending += self._waiting[0].length
            if self._running and pending > _AHEAD_BYTES:
                break
            info = self._waiting.popleft()
            buffer = self._get_buffer(info.length)
            reading = self._pool.submit(self._read, info, self._open(info), buffer)
            self._running.append((info, reading))

    def _open(self, info: _StorageInfo) -> int:
        name = info.relative_path
        if name not in self._files:
            check_stays_inside(self._folder, name)
            self._files[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._files[name]

    def _read(
        self, info: _StorageInfo, file: int, buffer: bytearray
    ) -> tuple[bytearray, memoryview]:
        data = memoryview(buffer)[: info.length]
        expected = get_checksum(info) if self._checks.verify_checksums else None
        checksum, at = 0, 0
        while at < info.length:
            end = min(at + _PIECE_BYTES, info.length)
            count = os.preadv(file, [data[at:end]], info.offset + at)
            if not count:
                raise BadCheckpoint(f"{self._name(info)} is truncated. {_COPY_AGAIN}")
            if expected is not None:
                checksum = crc32(data[at : at + count], checksum)
            at += count
        if expected is not None and checksum != expected:
            raise BadCheckpoint(
                f"{self._name(info)} is damaged, or belongs to another step: its bytes "
                f"{info.offset} to {info.offset + info.length} do not have the CRC-32 that was "
                f"stored for them. {_COPY_AGAIN}"
            )
        if expected is None and self._checks.verify_checksums:
            self._check_records(info, data)
        return buffer, data

    def _check_records(self, info: _StorageInfo, data: memoryview) -> None:
        """Verify an item without a checksum of ours by the checksums in torch's zip records.

        Earlier releases, and Megatron without this package, write such items.
        """
        try:
            has_checksums = check_records(Window(data))
        except Exception as error:  # damaged bytes raise almost anything
            raise BadCheckpoint(
                f"{self._name(info)} is damaged: its bytes {info.offset} to "
                f"{info.offset + info.length} ({error}). {_COPY_AGAIN}"
            ) from error
        if not has_checksums:
            self._checks.note_missing(self._name(info))

    def _name(self, info: _StorageInfo) -> str:
        return str(self._folder / info.relative_path)

    def _get_buffer(self, num_bytes: int) -> bytearray:
        # Buffers are reused: the first touch of newly allocated memory takes as long as reading.
        for index, buffer in enumerate(self._free):
            if len(buffer) >= num_bytes:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        return bytearray(num_bytes)
