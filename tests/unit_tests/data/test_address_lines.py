"""Lines of a file of a remote file system."""

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from trinity_megatron.data.address import StoredAt
from trinity_megatron.data.streams import open_stream, read_lines

_CONTENT = b'{"text": "one"}\n{"text": "two"}\n'


class _File(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return _CONTENT[start:end]


class _System(AbstractFileSystem):
    protocol = "linestest"

    def info(self, path, **kwargs):
        return {"name": path, "size": len(_CONTENT), "type": "file"}

    def _open(self, path, mode="rb", **kwargs):
        return _File(self, path, mode, size=len(_CONTENT))


def test_lines_of_a_remote_file():
    fsspec.register_implementation("linestest", _System, clobber=True)
    stored = StoredAt("linestest://web.jsonl", len(_CONTENT))
    with open_stream(stored) as stream:
        assert list(read_lines(stream)) == _CONTENT.splitlines(keepends=True)
