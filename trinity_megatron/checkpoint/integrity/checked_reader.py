"""Reading what a ``torch_dist`` checkpoint stores, with its checksums compared.

Threads read ahead and compare while what was read before is taken over.
"""

import logging
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import _weights_only_unpickler, serialization
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from trinity_megatron.checkpoint.integrity.checksums import (
    Window,
    check_records,
    crc32,
    get_checksum,
    seal,
    unseal,
)
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint, load_metadata

logger = logging.getLogger(__name__)

_NUM_THREADS = 2
# What is read ahead, unless one item is larger.
_AHEAD_BYTES = 256 * 2**20
# Compared while it is still in the processor's cache.
_PIECE_BYTES = 2**20


@dataclass
class Checks:
    """Whether checksums are compared, and which files were found to have none.

    Attributes:
        verify_checksums: Compare them.
        quiet: Do not say which files have none.
        refused: Why a ``.metadata`` was not loaded; torch goes on and forgets it.
    """

    verify_checksums: bool = True
    quiet: bool = False
    refused: BadCheckpoint | None = None
    _said: set[str] = field(default_factory=set)

    def note_missing(self, path: str | Path) -> None:
        """Say once that a checkpoint has no checksums."""
        folder = os.path.dirname(path)
        if not self.quiet and folder not in self._said:
            self._said.add(folder)
            logger.warning(
                "%s has no checksum (an earlier release wrote it): damage in it is not noticed.",
                path,
            )


@dataclass
class MetadataPickle:
    """Stands in the place of ``pickle`` where torch reads and writes ``.metadata``."""

    checks: Checks

    def load(self, stream: Any) -> Metadata:
        """See :func:`read_metadata`."""
        try:
            return read_metadata(stream.read(), stream.name, self.checks)
        except BadCheckpoint as error:
            self.checks.refused = error
            raise

    def dump(self, metadata: Metadata, stream: Any) -> None:
        """Write the pickle and its checksum."""
        stream.write(seal(pickle.dumps(metadata)))


def read_metadata(content: bytes, path: str | Path, checks: Checks) -> Metadata:
    """Unpickle a ``.metadata`` after a look at its checksum and at what it names.

    Args:
        content: Of the file.
        path: Its name.
        checks: What is compared.

    Raises:
        BadCheckpoint: It is damaged, or names what no checkpoint holds.
    """
    if not checks.verify_checksums:
        return load_metadata(content, path)[0]
    try:
        pickled, is_sealed = unseal(content)
    except ValueError as error:
        raise BadCheckpoint(f"{path} is damaged ({error}). Remedy: copy it again.") from error
    metadata, rest = load_metadata(pickled, path)
    if rest:
        raise BadCheckpoint(f"{path} is damaged (its end is not readable). Remedy: copy it again.")
    if not is_sealed:
        checks.note_missing(path)
    return metadata


class ReadAhead:
    """Reads the items of a checkpoint in threads and compares their checksums.

    Args:
        folder: Of the checkpoint.
        infos: Places of the items, in the order in which they will be taken.
        checks: What is compared.
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
        """An item, valid until the next call.

        Raises:
            BadCheckpoint: It does not have its checksum.
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
        """Words of an error, with the file of the item that was taken last."""
        if self._last is None or self._name(self._last) in str(error):
            return str(error)
        return f"{self._name(self._last)}: {error}"

    def _start(self) -> None:
        """Begin to read what comes next."""
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
        """Compare what an earlier release, or Megatron alone, has stored."""
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
        # Touching fresh memory takes as long as reading: it is used again.
        for index, buffer in enumerate(self._free):
            if len(buffer) >= num_bytes:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        return bytearray(num_bytes)


_COPY_AGAIN = "Remedy: copy the file again."


def check_stays_inside(folder: Path, name: str) -> None:
    """Refuse a symbolic link that leads out of a checkpoint.

    Raises:
        BadCheckpoint: Names the link.
    """
    path = folder / name
    if path.is_symlink() and folder.resolve() not in path.resolve().parents:
        raise BadCheckpoint(
            f"{path} is a symbolic link that leads out of the checkpoint, to {path.resolve()}. "
            "Remedy: put the file itself there."
        )


def reading_ahead(
    read_data: Callable[..., Any], get_checks: Callable[[Any], Checks]
) -> Callable[..., Any]:
    """``FileSystemReader.read_data`` with what it reads read ahead, and checked.

    Args:
        read_data: torch's method.
        get_checks: What to compare, for a reader.
    """

    def read(self: Any, plan: Any, planner: Any) -> Any:
        if not isinstance(self.fs, FileSystem):  # of another package, not on this machine
            return read_data(self, plan, planner)
        by_file: dict[str, list[_StorageInfo]] = {}
        for item in plan.items:  # torch reads file by file
            info = self.storage_data[item.storage_index]
            by_file.setdefault(info.relative_path, []).append(info)
        infos = [info for places in by_file.values() for info in places]
        with ReadAhead(Path(self.path), infos, get_checks(self)) as self.read_ahead:
            try:
                return read_data(self, plan, planner)
            except BadCheckpoint as error:
                raise BadCheckpoint(self.read_ahead.locate(error)) from error
            finally:
                self.read_ahead = None

    return read


def load_in_place(load: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.load`` that makes tensors of what was read ahead where it lies, without a copy.

    Args:
        load: For everything else.
    """

    def load_tensor(f: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(f, Window):
            return load(f, *args, **kwargs)
        storage = torch.frombuffer(f.data, dtype=torch.uint8).untyped_storage()
        with serialization._open_zipfile_reader(f) as archive:  # type: ignore[arg-type]
            # As torch.load does with weights_only and mmap, which takes the name of a file only.
            return serialization._load(
                archive, "cpu", _weights_only_unpickler, overall_storage=storage, encoding="utf-8"
            )

    return load_tensor


def slicing_checked(slice_file: Callable[..., Any]) -> Callable[..., Any]:
    """``FileSystemReader._slice_file`` that gives what was read ahead."""

    def take(self: Any, file: Any, info: _StorageInfo) -> Any:
        ahead = getattr(self, "read_ahead", None)
        return slice_file(self, file, info) if ahead is None else ahead.take(info)

    return take


class CheckedReader(FileSystemReader):
    """torch's reader that compares checksums and calls nothing that a checkpoint names.

    Args:
        path: Folder of the checkpoint.
        checks: What is compared.
    """

    def __init__(self, path: Path, checks: Checks) -> None:
        super().__init__(path)
        self.checks = checks

    read_data = reading_ahead(FileSystemReader.read_data, lambda reader: reader.checks)
    _slice_file = slicing_checked(FileSystemReader._slice_file)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``."""
        path = Path(self.path) / ".metadata"
        return read_metadata(path.read_bytes(), path, self.checks)
