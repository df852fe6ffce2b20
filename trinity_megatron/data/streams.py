"""Files as streams of bytes: compression is recognized by content and removed, so is UTF-16."""

import codecs
import io
import lzma
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, BinaryIO, Literal, Protocol, cast

# One document or row must fit in memory several times over while it is encoded.
MAX_DOCUMENT_BYTES = 2**30
_CHUNK_BYTES = 2**20
_MAX_LAYERS = 3

# A zstd stream may begin with a skippable frame (pzstd, seekable format).
_COMPRESSIONS = (
    ("gzip", re.compile(rb"\x1f\x8b\x08")),
    ("bz2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")),
    ("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    ("xz", re.compile(rb"\xfd7zXZ\x00")),
    ("lz4", re.compile(rb"\x04\x22\x4d\x18")),
)
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class StoredFile(Protocol):
    """A file that can be read: a ``Path``, or one of another file system."""

    @property
    def name(self) -> str:
        """Its last component."""

    @property
    def suffix(self) -> str:
        """The last suffix."""

    @property
    def suffixes(self) -> Sequence[str]:
        """All suffixes."""

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open it for reading."""

    def stat(self) -> Any:
        """Size and modification time, as ``os.stat``."""


class DamagedFileError(OSError):
    """A file whose content ends early or contradicts its own format."""


class _IteratorStream(io.RawIOBase):
    """A readable stream over an iterator of non-empty chunks."""

    def __init__(self, chunks: Iterator[bytes], source: BinaryIO) -> None:
        self._chunks, self._source = chunks, source
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._source.close()
        super().close()


def find_compressions(path: StoredFile, num_bytes: int) -> tuple[tuple[str, ...], bytes]:
    """The compressions around a file's content, outermost first, and the content's first bytes.

    Raises:
        OSError: If the file cannot be read.
    """
    layers: tuple[str, ...] = ()
    while len(layers) <= _MAX_LAYERS:
        with open_stream(path, layers) as stream:
            head = stream.read(num_bytes)
        found = [name for name, magic in _COMPRESSIONS if magic.match(head)]
        if not found:
            return layers, head
        layers = (*layers, found[0])
    raise DamagedFileError(f"compressed more than {_MAX_LAYERS} times")


def find_encoding(head: bytes) -> str | None:
    """The encoding that a byte-order mark announces; None without one, or if it is not true."""
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            try:
                text = codecs.getincrementaldecoder(name)().decode(head)
            except UnicodeDecodeError:
                return None
            return None if "\0" in text else name
    return None


def open_stream(
    path: StoredFile, layers: tuple[str, ...] = (), encoding: str | None = None
) -> BinaryIO:
    """Open a file for reading forwards.

    Every member or frame of a compressed file is read; one that ends early raises.

    Args:
        path: The file.
        layers: Compressions to remove, outermost first.
        encoding: What its byte-order mark announces; the stream is then UTF-8 without a mark.

    Raises:
        OSError: If the file cannot be read, here or while reading.
    """
    stream = cast(BinaryIO, path.open("rb"))
    for layer in layers:
        stream = _decompress(stream, layer)
    if encoding == "utf-8-sig":
        stream.read(len(codecs.BOM_UTF8))
    elif encoding is not None:
        stream = _buffered(_recode(stream, encoding), stream)
    return stream


def read_whole(stream: BinaryIO) -> bytes:
    """All bytes of a stream.

    Raises:
        DamagedFileError: If they are more than one document may have.
    """
    content = stream.read(MAX_DOCUMENT_BYTES + 1)
    check_size(len(content))
    return content


def check_size(num_bytes: int) -> None:
    """Check that a document is not larger than what is kept in memory.

    Raises:
        DamagedFileError: If it is.
    """
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise DamagedFileError(
            f"too large: one document or row has more than {MAX_DOCUMENT_BYTES >> 20} MiB; cut a "
            "text into documents with --split-on"
        )


def read_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of a stream, ends included.

    Raises:
        DamagedFileError: If one is larger than a document may be.
    """
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        check_size(len(line))
        yield line


def split_stream(stream: BinaryIO, separator: str) -> Iterator[tuple[bytes, bool]]:
    """What lies between the separators, as it is; a last piece of white space alone is dropped.

    A line end in the separator matches a Windows line end, too.

    Yields:
        A piece, and whether a separator follows it.

    Raises:
        DamagedFileError: If a piece is larger than a document may be.
    """
    lines = separator.replace("\r\n", "\n").encode("utf-8").split(b"\n")
    pattern = re.compile(rb"\r?\n".join(map(re.escape, lines)))
    overlap = 2 * len(separator.encode("utf-8"))
    rest, size = b"", _CHUNK_BYTES
    while chunk := stream.read(size):
        start, searched = 0, max(0, len(rest) - overlap)
        rest += chunk
        for match in pattern.finditer(rest, searched):
            yield rest[start : match.start()], True
            start = match.end()
        rest = rest[start:]
        check_size(len(rest))
        size = max(_CHUNK_BYTES, len(rest))  # twice as much each time: linear in all
    if rest.strip():
        yield rest, False


def _decompress(stream: BinaryIO, layer: str) -> BinaryIO:
    if layer == "xz":
        return _buffered(_read_xz(stream), stream)
    import pyarrow  # here, for it takes longer than all the rest

    decompressed = pyarrow.CompressedInputStream(stream, layer)
    return io.BufferedReader(decompressed, _CHUNK_BYTES)


def _buffered(chunks: Iterator[bytes], source: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_IteratorStream(chunks, source), _CHUNK_BYTES)


def _read_xz(stream: BinaryIO) -> Iterator[bytes]:
    """Decompress every stream of an .xz file; Python's own reader ignores what follows damage."""
    data = stream.read(_CHUNK_BYTES)
    while data:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        while not decompressor.eof:
            if not data and decompressor.needs_input:
                data = stream.read(_CHUNK_BYTES)
                if not data:
                    raise DamagedFileError("cut off: truncated xz stream")
            try:
                content = decompressor.decompress(data, _CHUNK_BYTES)
            except lzma.LZMAError as error:
                raise DamagedFileError(f"damaged: {error} (xz)") from error
            data = b""
            if content:
                yield content
        data = decompressor.unused_data.lstrip(b"\0")  # padding between streams
        while not data and (data := stream.read(_CHUNK_BYTES)):
            data = data.lstrip(b"\0")


def _recode(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    while True:
        chunk = stream.read(_CHUNK_BYTES)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise DamagedFileError(f"not {encoding.upper()} text: {error.reason}") from error
        if text:
            yield text.encode("utf-8")
        if not chunk:
            return
