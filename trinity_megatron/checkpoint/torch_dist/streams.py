"""A file system for ``torch.distributed.checkpoint`` that does not fill the page cache."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from trinity_megatron.checkpoint.page_cache import WriteBehind


class StreamingFileSystem(FileSystem):
    """torch's local file system; writes go to disk and out of the page cache at once."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with open(path, mode, buffering=2**20) as stream:
                yield stream
            return
        with open(path, "wb", buffering=0) as raw, _WriteBehindStream(raw) as stream:
            yield stream


class _WriteBehindStream(io.BufferedWriter):
    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw, buffer_size=2**20)
        self._behind = WriteBehind(self.fileno())

    def write(self, data: Any, /) -> int:
        written = super().write(data)
        self._behind.wrote(written)
        return written
