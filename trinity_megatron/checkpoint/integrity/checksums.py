"""CRC-32 of what a checkpoint stores: found without reading it again, kept in ``.metadata``.

torch stores each tensor and each object as a zip archive with the CRC-32 of every record, and
compares none of them.  The checksum of the whole item follows from those by arithmetic, and goes
with its place into ``.metadata``, so that a file of another step is noticed too.  ``.metadata``
itself ends in its own checksum, behind the pickle, where other readers do not look.
"""

import io
import os
import re
import struct
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo

try:
    from isal.isal_zlib import crc32  # by the processor's own instructions: five times as fast
except ImportError:
    from zlib import crc32

_POLYNOMIAL = 0xEDB88320  # of CRC-32, the lowest power in the highest bit
_ONE, _X_TO_THE_8 = 1 << 31, 1 << 23
# Records and items below these sizes are read: that is faster than the arithmetic, and than finding
# out what is in the archive.
_SMALL_BYTES, _SMALL_ITEM_BYTES = 64 * 2**10, 128 * 2**10
_PIECE_BYTES = 2**20
_LOCAL_HEADER_BYTES = 30
_TRAILER = re.compile(rb"\ncrc32 ([0-9a-f]{8})\n")
_TRAILER_BYTES = len(b"\ncrc32 01234567\n")


def combine(first: int, second: int, num_bytes: int) -> int:
    """CRC-32 of two pieces behind each other.

    Args:
        first: CRC-32 of the first.
        second: CRC-32 of the second.
        num_bytes: Size of the second.

    Source: ``crc32_combine`` of zlib.
    """
    return _multiply(_shift(num_bytes), first) ^ second


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2), modulo that of CRC-32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=1024)
def _shift(num_bytes: int) -> int:
    """``x ** (8 * num_bytes)``: what so many further bytes multiply a checksum by."""
    power, factor = _ONE, _X_TO_THE_8
    while num_bytes:
        if num_bytes & 1:
            power = _multiply(power, factor)
        factor = _multiply(factor, factor)
        num_bytes >>= 1
    return power


class _Part(io.RawIOBase):
    """A part of something, as a file of its own."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._at = num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer).cast("B")
        count = self._copy(target[: max(self._num_bytes - self._at, 0)], self._at)
        self._at += count
        return count

    def _copy(self, target: memoryview, at: int) -> int:
        raise NotImplementedError


class Window(_Part):
    """Memory as a file.

    Attributes:
        data: The memory; empty with ``tensor``.
        tensor: The stored tensor, where it was read into a tensor instead.
    """

    def __init__(self, data: memoryview, tensor: Tensor | None = None) -> None:
        super().__init__(len(data))
        self.data, self.tensor = data, tensor

    def _copy(self, target: memoryview, at: int) -> int:
        target[:] = self.data[at : at + len(target)]
        return len(target)


class FilePart(_Part):
    """Some bytes of a file as a file.

    Args:
        file: Descriptor of the whole.
        offset: The first byte.
        num_bytes: How many.
    """

    def __init__(self, file: int, offset: int, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._file, self._offset = file, offset

    def _copy(self, target: memoryview, at: int) -> int:
        return os.preadv(self._file, [target], self._offset + at)


def derive_checksum(item: BinaryIO | io.RawIOBase, num_bytes: int) -> int | None:
    """CRC-32 of a stored item, from the checksums that it has inside.

    Args:
        item: The zip archive.
        num_bytes: Its size.

    Returns:
        The checksum; None if there are none inside.
    """

    def read(begin: int, end: int) -> bytes:
        item.seek(begin)
        return item.read(end - begin) or b""

    if num_bytes < _SMALL_ITEM_BYTES:
        return crc32(read(0, num_bytes))
    checksum, at = 0, 0
    for record in _records(item):
        if record.file_size < _SMALL_BYTES:
            continue  # with what lies around it
        if not record.CRC or record.compress_type:
            return None
        start = record.header_offset + _header_bytes(
            read(record.header_offset, record.header_offset + _LOCAL_HEADER_BYTES)
        )
        checksum = combine(crc32(read(at, start), checksum), record.CRC, record.file_size)
        at = start + record.file_size
    return crc32(read(at, num_bytes), checksum)


def check_records(item: BinaryIO | io.RawIOBase) -> bool:
    """Compare the checksums inside a stored item, or a file that ``torch.save`` wrote.

    Args:
        item: The zip archive.

    Returns:
        Whether it has any.

    Raises:
        ValueError: One does not fit.
        zipfile.BadZipFile: It is no zip archive.
    """
    records = _records(item)
    if not any(record.CRC for record in records):
        return False
    for record in records:
        item.seek(record.header_offset)
        header = item.read(_LOCAL_HEADER_BYTES) or b""
        item.seek(record.header_offset + _header_bytes(header))
        checksum, left = 0, record.file_size
        while piece := item.read(min(left, _PIECE_BYTES)):
            checksum, left = crc32(piece, checksum), left - len(piece)
        if record.compress_type or left or checksum != record.CRC:
            raise ValueError(f"{record.filename} does not have the CRC-32 that was stored with it")
    return True


def _records(item: Any) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(item) as archive:
        return sorted(archive.infolist(), key=lambda record: record.header_offset)


def _header_bytes(header: bytes) -> int:
    """Size of a record's header, with its name and padding."""
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("a record has no header")
    name, extra = struct.unpack("<HH", header[26:30])
    return _LOCAL_HEADER_BYTES + name + extra


def get_checksum(info: _StorageInfo) -> int | None:
    """CRC-32 of a stored item as ``.metadata`` has it; None if it has none."""
    return getattr(info, "crc32", None)


def set_checksum(info: _StorageInfo, checksum: int | None) -> None:
    """Have ``.metadata`` hold the CRC-32 of a stored item."""
    if checksum is not None:
        info.crc32 = checksum  # type: ignore[attr-defined]


def add_checksums(folder: Path, infos: Iterable[_StorageInfo]) -> None:
    """Give the items that were just written their checksums.

    Args:
        folder: Of the checkpoint.
        infos: Their places.
    """
    by_file: dict[str, list[_StorageInfo]] = {}
    for info in infos:
        by_file.setdefault(info.relative_path, []).append(info)
    for name, places in by_file.items():
        with (folder / name).open("rb") as file:
            for info in places:
                item = FilePart(file.fileno(), info.offset, info.length)
                set_checksum(info, derive_checksum(item, info.length))


def seal(content: bytes) -> bytes:
    """``.metadata`` with its checksum behind it."""
    return content + b"\ncrc32 %08x\n" % crc32(content)


def unseal(content: bytes) -> tuple[bytes, bool]:
    """Take the checksum of ``.metadata`` off, and compare it.

    Args:
        content: Of the file.

    Returns:
        The pickle, and whether there was a checksum.

    Raises:
        ValueError: It does not fit.
    """
    pickled, trailer = content[:-_TRAILER_BYTES], content[-_TRAILER_BYTES:]
    found = _TRAILER.fullmatch(trailer)
    if found is None:
        return content, False
    if int(found[1], 16) != crc32(pickled):
        raise ValueError("it does not have the CRC-32 that was stored with it")
    return pickled, True
