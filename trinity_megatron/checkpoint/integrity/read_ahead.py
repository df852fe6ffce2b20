"""Threads that read the items of a checkpoint ahead and compare their checksums."""

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo

from trinity_megatron.checkpoint.integrity.checks import Checks, check_stays_inside
from trinity_megatron.checkpoint.integrity.checksums import (
    Window,
    check_records,
    get_checksum,
)
from trinity_megatron.checkpoint.integrity.direct_read import (
    read_checksum,
    read_into,
    read_pieces,
)
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint

_NUM_THREADS = 2
# Most bytes read ahead, unless one item is larger.
_AHEAD_BYTES = 256 * 2**20
# Of items that are only verified: a piece is hashed while it lies in the processor's cache.
_PIECE_BYTES = 2**20
_COPY_AGAIN = "Remedy: copy the file again."


@dataclass(frozen=True)
class Request:
    """What to read.

    Attributes:
        info: Location of the item.
        target: Tensor to read it into, if it is stored as one of the same kind; None: read it into
            a buffer.
    """

    info: _StorageInfo
    target: Tensor | None = None


class ReadAhead:
    """Reads the items of a checkpoint in threads and verifies their checksums.

    Args:
        folder: Folder of the checkpoint.
        requests: The items, in the order in which :meth:`take` will be called.
        checks: Settings of the integrity checks.
        only_verify: The items are not needed: :meth:`take` returns empty memory for those that have
            a checksum.
    """

    def __init__(
        self,
        folder: Path,
        requests: Iterable[Request],
        checks: Checks,
        *,
        only_verify: bool = False,
    ) -> None:
        self._folder, self._checks = folder, checks
        self._only_verify = only_verify
        self._waiting = deque(requests)
        self._running: deque[tuple[_StorageInfo, Future[tuple[bytearray, Window]]]] = deque()
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
        if self._taken:
            self._free.append(self._taken)
        self._last = info
        self._start()
        if self._running and self._running[0][0] is info:
            self._taken, window = self._running.popleft()[1].result()
        else:
            buffer = self._get_buffer(info.length)
            self._taken, window = self._read(Request(info), self._open(info), buffer)
        return window

    def locate(self, error: BadCheckpoint) -> str:
        """The message of an error, prefixed with the file of the item taken last."""
        if self._last is None or self._name(self._last) in str(error):
            return str(error)
        return f"{self._name(self._last)}: {error}"

    def _start(self) -> None:
        """Start to read the next items."""
        pending = sum(info.length for info, _ in self._running)
        while self._pool is not None and self._waiting and len(self._running) < 2 * _NUM_THREADS:
            pending += self._waiting[0].info.length
            if self._running and pending > _AHEAD_BYTES:
                break
            request = self._waiting.popleft()
            has_target = request.target is not None
            length = _PIECE_BYTES if self._only_verify else request.info.length
            buffer = bytearray() if has_target else self._get_buffer(length)
            reading = self._pool.submit(self._read, request, self._open(request.info), buffer)
            self._running.append((request.info, reading))

    def _open(self, info: _StorageInfo) -> int:
        name = info.relative_path
        if name not in self._files:
            check_stays_inside(self._folder, name)
            self._files[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._files[name]

    def _read(self, request: Request, file: int, buffer: bytearray) -> tuple[bytearray, Window]:
        info, verify = request.info, self._checks.verify_checksums
        expected = get_checksum(info) if verify else None
        try:
            if request.target is not None and (expected is not None or not verify):
                checksum = read_into(request.target, file, info, verify=verify)
                if checksum is not None:
                    self._compare(info, checksum, expected)
                    return buffer, Window(memoryview(b""), request.target)
            if self._only_verify and expected is not None:
                checksum = read_checksum(buffer, file, info.offset, info.length)
                self._compare(info, checksum, expected)
                return buffer, Window(memoryview(b""))
            if len(buffer) < info.length:
                buffer = bytearray(info.length)
            data = memoryview(buffer)[: info.length]
            checksum = read_pieces(data, file, info.offset, 0 if expected is not None else None)
        except EOFError as error:
            raise BadCheckpoint(f"{self._name(info)} is truncated. {_COPY_AGAIN}") from error
        self._compare(info, checksum, expected)
        if expected is None and verify:
            self._check_records(info, data)
        return buffer, Window(data)

    def _compare(self, info: _StorageInfo, checksum: int | None, expected: int | None) -> None:
        if expected is not None and checksum != expected:
            raise BadCheckpoint(
                f"{self._name(info)} is damaged, or belongs to another step: its bytes "
                f"{info.offset} to {info.offset + info.length} do not have the CRC-32 that was "
                f"stored for them. {_COPY_AGAIN}"
            )

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
