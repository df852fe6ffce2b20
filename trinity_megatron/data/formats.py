"""What a file holds, decided by its content; its suffix only settles what content leaves open."""

import codecs
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from trinity_megatron.data import rows, tables
from trinity_megatron.data.streams import (
    DamagedFileError,
    StoredFile,
    find_compressions,
    find_encoding,
    open_stream,
)
from trinity_megatron.errors import UserError

TEXT_FIELD = "text"

Kind = Literal[
    "text", "json_lines", "json_values", "csv", "parquet", "arrow_file", "arrow_stream", "unread"
]

_HEAD_BYTES = 2**16
_COMPRESSION_SUFFIXES = (".gz", ".gzip", ".bz2", ".zst", ".zstd", ".xz", ".lz4")
# Compressions without first bytes of their own.
_UNKNOWN_COMPRESSION_SUFFIXES = (".br", ".lzma")
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_TABLE_SUFFIXES = (".parquet", ".arrow", ".feather", ".orc", ".avro")
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|", ".tab": "\t,;|"}
_ROW_SUFFIXES = (".json", *_JSON_LINES_SUFFIXES, *_DELIMITERS)
_DATA_SUFFIXES = {*_ROW_SUFFIXES, *_TABLE_SUFFIXES, *_COMPRESSION_SUFFIXES, ".txt"}
# Suffixes of formats that are zip archives but hold no text to train on.
_PROGRAM_ARCHIVES = (".jar", ".whl", ".egg", ".apk", ".pt", ".pth", ".npz", ".keras", ".ckpt")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"

# Formats that may hold text and are not read: offset, first bytes, name.
_UNREAD = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"ORC", "an ORC file"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"FEA1", "a Feather file of version 1"),
    (0, b"LZIP", "an lzip file"),
    (0, b"\x1f\x9d", "a compress (.Z) file"),
    (0, b"\xff\x06\0\0sNaPpY", "a snappy file"),
    (0, b"\x89LZO\0", "an LZO file"),
)


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in files.

    Attributes:
        text_key: Field or column that holds the text of a row; dots lead into objects.
        split_on: What separates the documents of a text file; None: it is one document.
        skip_bad_rows: Number of invalid rows that are left out instead of being an error.
        plain_text: Whether JSON and CSV files are read as text too.
    """

    text_key: str = TEXT_FIELD
    split_on: str | None = None
    skip_bad_rows: int = 0
    plain_text: bool = False

    def __post_init__(self) -> None:
        if not self.text_key:
            raise UserError("text_key is empty; pass --text-key with the name of a field")
        if self.split_on == "":
            raise UserError("split_on is empty; pass --split-on with what separates documents")
        if self.skip_bad_rows < 0:
            raise UserError(f"skip_bad_rows {self.skip_bad_rows} is negative; pass 0 or more")


@dataclass(frozen=True)
class Format:
    """What a file holds.

    Attributes:
        kind: How it is read; ``unread``: not at all.
        layers: Compressions around it, outermost first.
        encoding: What a byte-order mark announces.
        delimiter: Of a CSV file.
        reason: Why it is not read, or why a JSON or CSV file is no rows but plain text.
        could_be_text: Whether, not read, it may hold text.
        is_as_before: Whether releases that went by the suffix read it in the same way.
    """

    kind: Kind = "text"
    layers: tuple[str, ...] = ()
    encoding: str | None = None
    delimiter: str = ","
    reason: str = ""
    could_be_text: bool = False
    is_as_before: bool = True


def recognize(path: StoredFile, options: ReadOptions) -> Format:
    """Decide what a file holds by its first bytes, and for JSON and CSV by its first row.

    Raises:
        DamagedFileError: If its suffix promises data that the content is not.
        OSError: If it cannot be read.
    """
    layers, head = find_compressions(path, _HEAD_BYTES)
    file = _Head(path, layers, head, find_encoding(head), find_suffix(path))
    encoding = file.encoding
    found = _recognize_binary(file)
    if found is None:
        found = _recognize_text(file, options)
        bad = None if encoding or found[0] != "text" else _find_bad_byte(head)
        if bad is not None:
            reason = f"not UTF-8 text: {bad.reason} at byte {bad.start}"
            found = "unread", {"reason": reason, "could_be_text": True}
    kind, details = found
    before = {".jsonl": "json_lines", ".parquet": "parquet"}.get(path.suffix.lower(), "text")
    same = kind == before and not layers and encoding is None
    if kind == "unread":
        same = bool(layers) or b"\0" in head or not _is_utf8(head)
    return Format(kind, layers, encoding, is_as_before=same, **details)


def find_suffix(path: StoredFile) -> str:
    """The suffix of what is inside of the compression, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSION_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@dataclass(frozen=True)
class _Head:
    """A file and the first bytes inside of its compressions."""

    path: StoredFile
    layers: tuple[str, ...]
    content: bytes
    encoding: str | None
    suffix: str

    @property
    def last_suffix(self) -> str:
        return self.path.suffix.lower()

    @property
    def is_text(self) -> bool:
        is_utf8 = b"\0" not in self.content and _is_utf8(self.content)
        return self.encoding is not None or is_utf8

    def open(self) -> BinaryIO:
        return open_stream(self.path, self.layers, self.encoding)


Found = tuple[Kind, dict[str, Any]]


def _recognize_binary(file: _Head) -> Found | None:
    """What a file holds if its first bytes say so; None for text."""
    head, layers = file.content, file.layers
    table = _find_table(head)
    if table is not None and layers:
        raise DamagedFileError(f"a {table} file inside of {layers[-1]}; unpack it first")
    if table is not None:
        return table, {}
    for offset, magic, name in _UNREAD:
        if head[offset : offset + len(magic)] == magic:
            is_program = file.suffix in _PROGRAM_ARCHIVES
            return "unread", {"reason": name, "could_be_text": not is_program}
    if head.startswith(_LFS_POINTER):
        if {file.suffix, file.last_suffix} & _DATA_SUFFIXES:
            raise DamagedFileError("a Git LFS pointer, not the data; run `git lfs pull`")
        return "unread", {"reason": "a Git LFS pointer, not the file"}
    if not layers:
        _refuse_broken_promise(file)
    if file.last_suffix in _UNKNOWN_COMPRESSION_SUFFIXES and not file.is_text:
        return "unread", {"reason": f"a {file.last_suffix} file", "could_be_text": True}
    if file.encoding is None and b"\0" in head:
        if _looks_like_utf16(head):
            reason = "not UTF-8 text: UTF-16 without a byte-order mark"
            return "unread", {"reason": reason, "could_be_text": True}
        if file.suffix not in _JSON_LINES_SUFFIXES:  # whose bad rows are errors
            could_be_text = file.suffix in _DATA_SUFFIXES
            return "unread", {"reason": "binary: holds a NUL byte", "could_be_text": could_be_text}
    return None


def _find_table(head: bytes) -> Kind | None:
    if head.startswith(tables.PARQUET_MAGIC):
        return "parquet"
    if head.startswith(tables.ARROW_FILE_MAGIC):
        return "arrow_file"
    # Followed by the length of the schema.
    is_stream = head.startswith(tables.ARROW_STREAM_MAGIC) and 0 < int.from_bytes(
        head[4:8], "little"
    )
    return "arrow_stream" if is_stream and head[7:8] < b"\x10" else None


def _refuse_broken_promise(file: _Head) -> None:
    """Refuse a file whose suffix names a format of data and whose content is something else.

    Text in a file that is named as if it was compressed is read: downloads unpack some.
    """
    suffix = file.last_suffix
    is_table, is_compressed = suffix in _TABLE_SUFFIXES, suffix in _COMPRESSION_SUFFIXES
    if (is_table or is_compressed) and not file.content:
        raise DamagedFileError(f"an empty {suffix} file")
    if is_table or (is_compressed and not file.is_text):
        raise DamagedFileError(f"not a {suffix} file, although its name says so")


def _looks_like_utf16(head: bytes) -> bool:
    """Whether every other byte is mostly NUL, as in UTF-16 of European languages."""
    even, odd = head[::2], head[1::2]
    shares = sorted(part.count(0) / max(1, len(part)) for part in (even, odd))
    return shares[0] < 0.01 and shares[1] > 0.5 and len(head) >= 8


def _is_utf8(head: bytes) -> bool:
    return _find_bad_byte(head) is None


def _find_bad_byte(head: bytes) -> UnicodeDecodeError | None:
    """The first byte that is not UTF-8; the end of the head may cut a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD_BYTES)
    except UnicodeDecodeError as error:
        return error
    return None


def _recognize_text(file: _Head, options: ReadOptions) -> Found:
    if options.plain_text:
        return "text", {}
    if file.suffix in _DELIMITERS:
        return _recognize_csv(file, options.text_key)
    begin = file.content.decode(file.encoding or "utf-8", "ignore").lstrip()[:1]
    if begin in ("{", "["):
        with file.open() as stream:
            return _recognize_json(stream, file.suffix, options.text_key)
    if file.suffix in _JSON_LINES_SUFFIXES:
        return "json_lines", {}
    return "text", {"reason": "not JSON" if file.suffix == ".json" and begin else ""}


def _recognize_csv(file: _Head, key: str) -> Found:
    with file.open() as stream:
        delimiter, columns = rows.find_delimiter(stream, key, _DELIMITERS[file.suffix])
    if delimiter is not None:
        return "csv", {"delimiter": delimiter}
    reason = f"CSV without a column {key!r}, only {rows.shorten(columns)}"
    return "text", {"reason": reason if columns else ""}


def _recognize_json(stream: BinaryIO, suffix: str, key: str) -> Found:
    """Whether what begins as JSON is rows, by its first value.

    One object without the key may be a file of settings in a folder of code; many are rows.
    """
    is_named_lines, is_named_json = suffix in _JSON_LINES_SUFFIXES, suffix == ".json"
    values: rows.JsonValues | None = None
    try:
        values = rows.JsonValues(stream)
        first = next(iter(values), None)
    except DamagedFileError as error:
        if is_named_lines:
            return ("json_values" if values is not None and values.is_array else "json_lines"), {}
        return "text", {"reason": str(error) if is_named_json else ""}
    has_key = isinstance(first, dict) and rows.find_key(first, key)[0]
    kind: Kind = "json_values"
    if not values.is_array and values.is_at_end_of_line():
        kind = "json_lines"
    if is_named_lines or has_key or (values.is_array and first is None):
        return kind, {}
    if not isinstance(first, dict):
        return "text", {"reason": "JSON without rows" if is_named_json else ""}
    if not values.is_array and values.has_more():
        if _is_object_next(values):
            return kind, {}
        return "text", {"reason": "JSON with something behind it" if is_named_json else ""}
    return "text", {"reason": f"JSON without a field {key!r}, only {rows.list_keys(first)}"}


def _is_object_next(values: rows.JsonValues) -> bool:
    try:
        return isinstance(next(iter(values), None), dict)
    except DamagedFileError:
        return False
