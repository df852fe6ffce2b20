"""The head of Megatron's index of tokens: what it says fits the files, or it is refused."""

import struct
from pathlib import Path

# Source: megatron.core.datasets.indexed_dataset, _IndexWriter and DType.
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents
MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_BYTES_OF_TOKEN = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # by code; 6 and 7 are no whole numbers
_ENTRY_BYTES = 8


def read_index_size(index: Path, tokens: Path) -> tuple[int, int]:
    """Documents and tokens of a dataset.

    Args:
        index: The file ``.idx``.
        tokens: The file ``.bin``.

    Raises:
        ValueError: The index is damaged, or says that it is larger than its file.
        OSError: A file cannot be read.
    """
    index_bytes = index.stat().st_size
    with index.open("rb") as file:
        head = file.read(HEADER.size)
        file.seek(-min(_ENTRY_BYTES, index_bytes), 2)
        last = int.from_bytes(file.read(), "little")
    magic, version, code, sequences, entries = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
    # A length, a position, and a document's first sequence; a mode where there are modes.
    size = HEADER.size + sequences * (4 + _ENTRY_BYTES) + entries * _ENTRY_BYTES
    if magic != MAGIC or version != _VERSION or code not in _BYTES_OF_TOKEN:
        raise ValueError("it does not begin as an index of token ids")
    if index_bytes not in (size, size + sequences):
        raise ValueError(f"it has {index_bytes} bytes, and its head says {size}")
    if index_bytes == size and entries and last != sequences:
        raise ValueError(f"its last document ends with sequence {last} of {sequences}")
    return sequences, tokens.stat().st_size // _BYTES_OF_TOKEN[code]
