"""The head of Megatron's index of tokens: what it says fits the files, or it is refused."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from trinity_megatron.errors import UserError

# Source: megatron.core.datasets.indexed_dataset, _IndexWriter and DType.
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents
MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_BYTES_OF_TOKEN = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # by code; 6 and 7 are no whole numbers
_ENTRY_BYTES = 8


@dataclass(frozen=True)
class FileStamp:
    """By which a file that has changed is told: its size in bytes, and its time in ns."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStamp":
        """The stamp of a file."""
        return cls(status.st_size, status.st_mtime_ns)

    def check(self, path: Path, status: os.stat_result) -> None:
        """Refuse a file that is not the one of this stamp.

        Args:
            path: Of the file.
            status: That it has now.

        Raises:
            UserError: Names the file and what differs.
        """
        now = FileStamp.of(status)
        if now == self:
            return
        what = f"it has {now.size:,} bytes and had {self.size:,}"
        if now.size == self.size:
            what = "it has been written since"
        raise UserError(
            f"{path} has changed while the run started: {what}. Remedy: start again when nothing "
            "writes the data."
        )


@dataclass(frozen=True)
class IndexHead:
    """What the head of an index says, and its files as they were then.

    Attributes:
        documents: Number of documents, each one sequence.
        tokens: Number of tokens.
        has_modes: Whether each document has a mode: conversations have.
        index: Stamp of the file ``.idx``.
        bin: Stamp of the file ``.bin``.
    """

    documents: int
    tokens: int
    has_modes: bool
    index: FileStamp
    bin: FileStamp

    def check_unchanged(self, prefix: Path) -> None:
        """Refuse files that have changed since the head was read.

        Args:
            prefix: Of the files ``.idx`` and ``.bin``.

        Raises:
            UserError: Names the file and what differs.
            OSError: A file is not there any more.
        """
        for ending, stamp in (("idx", self.index), ("bin", self.bin)):
            path = Path(f"{prefix}.{ending}")
            stamp.check(path, path.stat())


def read_head(index: Path, tokens: Path) -> IndexHead:
    """Documents and tokens of a dataset; the index is opened once, the tokens are not.

    Args:
        index: The file ``.idx``.
        tokens: The file ``.bin``.

    Raises:
        ValueError: The index is damaged, or says that it is larger than its file.
        OSError: A file cannot be read.
    """
    with index.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        head = file.read(HEADER.size) or b""
        file.seek(-min(_ENTRY_BYTES, status.st_size), 2)
        last = int.from_bytes(file.read() or b"", "little")
    magic, version, code, sequences, entries = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
    # A length, a position, and a document's first sequence; a mode where there are modes.
    size = HEADER.size + sequences * (4 + _ENTRY_BYTES) + entries * _ENTRY_BYTES
    if magic != MAGIC or version != _VERSION or code not in _BYTES_OF_TOKEN:
        raise ValueError("it does not begin as an index of token ids")
    if status.st_size not in (size, size + sequences):
        raise ValueError(f"it has {status.st_size} bytes, and its head says {size}")
    if status.st_size == size and entries and last != sequences:
        raise ValueError(f"its last document ends with sequence {last} of {sequences}")
    bin_status = tokens.stat()
    return IndexHead(
        documents=sequences,
        tokens=bin_status.st_size // _BYTES_OF_TOKEN[code],
        has_modes=status.st_size != size,
        index=FileStamp.of(status),
        bin=FileStamp.of(bin_status),
    )
