"""The last step in a .wandb file, from which a killed offline run is continued.

wandb has no public way to tell it, and the rows of our journal may be ahead of the file of a killed
run: a row that is sent twice would give the step two rows.
"""

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from trinity_megatron.telemetry.wandb_run import record_type

_BLOCK_BYTES, _HEADER_BYTES, _TAIL_BYTES = 32 << 10, 7, 1 << 20
_FULL, _FIRST, _LAST = 1, 2, 4


def last_history_step(file: Path) -> int:
    """The last step in a .wandb file, -1 if it has none; of a long file the end is read alone."""
    parse = record_type().FromString
    with contextlib.suppress(OSError), file.open("rb") as stream:
        tail = max(0, (file.stat().st_size - _TAIL_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES)
        for start in dict.fromkeys((tail, 0)):
            stream.seek(start)
            records = map(parse, read_records(stream.read(), is_tail=start > 0))
            if steps := [r.history.step.num for r in records if r.HasField("history")]:
                return max(steps)
    return -1


def read_records(data: bytes, *, is_tail: bool = False) -> Iterator[bytes]:
    """Split a .wandb file, or its tail from a block on, into records up to the first damaged one.

    Source: the log format of LevelDB (doc/log_format.md), with zlib's CRC and a header before it.
    """
    position, parts = 0 if is_tail else _HEADER_BYTES, None
    while len(header := data[position : position + _HEADER_BYTES]) == _HEADER_BYTES:
        if (left := _BLOCK_BYTES - position % _BLOCK_BYTES) < _HEADER_BYTES:  # filled up
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", header)
        content = data[position + _HEADER_BYTES : position + _HEADER_BYTES + length]
        if zlib.crc32(content, zlib.crc32(header[6:])) != checksum:
            return
        position += _HEADER_BYTES + length
        if kind in (_FULL, _FIRST):
            parts = content
        elif parts is not None:  # else the record began before the tail
            parts += content
        if kind in (_FULL, _LAST) and parts is not None:
            yield parts
