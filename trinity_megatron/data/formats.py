"""What a file holds, decided by its content; its suffix only settles what content leaves open."""

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from trinity_megatron.data import rows, tables
from trinity_megatron.data.streams import (
    DamagedFileError,
    find_byte_order_mark,
    find_compressions,
    open_stream,
)

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
            raise ValueError("text_key is empty; pass --text-key with the name of a field")
        if self.split_on == "":
            raise ValueError("split_on is empty; pass --split-on with what separates documents")
        if self.skip_bad_rows < 0:
            raise ValueError(f"skip_bad_rows {self.skip_bad_rows} is negative; pass 0 or more")


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


def recognize(path: Path, options: ReadOptions) -> Format:
    """Decide what a file holds by its first bytes, and for JSON and CSV by its first row.

    Raises:
        DamagedFileError: If its suffix promises data that the content is not.
        OSError: If it cannot be read.
    """
    layers = find_compressions(path)
    with open_stream(path, layers) as stream:
        head = stream.read(_HEAD_BYTES)
    suffix = find_suffix(path)
    encoding = find_byte_order_mark(head)
    found = _recognize_binary(head, path, suffix, layers, encoding)
    if found is None:
        found = _recognize_text(path, suffix, layers, encoding, options)
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


def find_suffix(path: Path) -> str:
    """The suffix of what is inside of the compression, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSION_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


Found = tuple[Kind, dict[str, Any]]


def _recognize_binary(
    head: bytes, path: Path, suffix: str, layers: tuple[str, ...], encoding: str | None
) -> Found | None:
    """What a file holds if its first bytes say so; None for text."""
    table = _find_table(head)
    if table is not None and layers:
        raise DamagedFileError(f"a {table} file inside of {layers[-1]}; unpack it first")
    if table is not None:
        return table, {}
    for offset, magic, name in _UNREAD:
        if head[offset : offset + len(magic)] == magic:
            is_program = suffix in _PROGRAM_ARCHIVES
            return "unread", {"reason": name, "could_be_text": not is_program}
    if head.startswith(_LFS_POINTER):
        if {suffix, path.suffix.lower()} & {*_ROW_SUFFIXES, *_TABLE_SUFFIXES, ".txt"} or layers:
            raise DamagedFileError("a Git LFS pointer, not the data; run `git lfs pull`")
        return "unread", {"reason": "a Git LFS pointer, not the file"}
    if not layers:
        _refuse_broken_promise(head, path, encoding)
    is_text = encoding is not None or _is_utf8(head)
    if path.suffix.lower() in _UNKNOWN_COMPRESSION_SUFFIXES and not is_text:
        reason = f"a {path.suffix.lower()} file"
        return "unread", {"reason": reason, "could_be_text": True}
    if encoding is None and b"\0" in head:
        if _looks_like_utf16(head):
            reason = "not UTF-8 text: UTF-16 without a byte-order mark"
            return "unread", {"reason": reason, "could_be_text": True}
        return "unread", {"reason": "binary: holds a NUL byte"}
    return None


def _find_table(head: bytes) -> Kind | None:
    if head.startswith(tables.PARQUET_MAGIC):
        return "parquet"
    if head.startswith(tables.ARROW_FILE_MAGIC):
        return "arrow_file"
    return "arrow_stream" if head.startswith(tables.ARROW_STREAM_MAGIC) else None


def _refuse_broken_promise(head: bytes, path: Path, encoding: str | None) -> None:
    """Refuse a file whose suffix names a format of data and whose content is something else.

    Text in a file that is named as if it was compressed is read: downloads unpack some.
    """
    suffix = path.suffix.lower()
    is_text = encoding is not None or (_is_utf8(head) and b"\0" not in head and head)
    if suffix in _TABLE_SUFFIXES or (suffix in _COMPRESSION_SUFFIXES and not is_text):
        what = f"a {suffix} file" if head else f"an empty {suffix} file"
        raise DamagedFileError(f"not {what}, although its name says so" if head else what)


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


def _recognize_text(
    path: Path,
    suffix: str,
    layers: tuple[str, ...],
    encoding: str | None,
    options: ReadOptions,
) -> Found:
    if options.plain_text:
        return "text", {}

    def open_again() -> BinaryIO:
        return open_stream(path, layers, encoding)

    if suffix in _DELIMITERS:
        with open_again() as stream:
            delimiter, columns = rows.find_delimiter(stream, options.text_key, _DELIMITERS[suffix])
        if delimiter is not None:
            return "csv", {"delimiter": delimiter}
        reason = f"CSV without a column {options.text_key!r}, only {rows.shorten(columns)}"
        return "text", {"reason": reason if columns else ""}
    with open_again() as stream:
        begin = stream.read(_HEAD_BYTES).lstrip()[:1]
        if begin not in (b"{", b"["):
            kind: Kind = "json_lines" if suffix in _JSON_LINES_SUFFIXES else "text"
            is_odd = suffix == ".json" and begin
            return kind, {"reason": "JSON without rows, or no JSON"} if is_odd else {}
    with open_again() as stream:
        return _recognize_json(stream, suffix, options.text_key)


def _recognize_json(stream: BinaryIO, suffix: str, key: str) -> Found:
    """Whether what begins as JSON is rows, by its first value.

    One object without the key may be a file of settings in a folder of code; many are rows.
    """
    is_named_json = suffix == ".json"
    try:
        values = rows.JsonValues(stream)
        first = next(iter(values), None)
        is_line = values.is_at_end_of_line()
        more = values.has_more()
    except DamagedFileError as error:
        if suffix in _JSON_LINES_SUFFIXES:
            return "json_lines", {}
        return "text", {"reason": str(error) if is_named_json else ""}
    if suffix in _JSON_LINES_SUFFIXES and not values.is_array:
        return ("json_lines" if is_line else "json_values"), {}
    is_rows = suffix in _JSON_LINES_SUFFIXES or (values.is_array and first is None)
    if is_rows or (isinstance(first, dict) and rows.find_key(first, key)[0]):
        return ("json_lines" if is_line and not values.is_array else "json_values"), {}
    if isinstance(first, dict) and not values.is_array and more:
        return ("json_lines" if is_line else "json_values"), {}
    if isinstance(first, dict):
        reason = f"JSON without a field {key!r}, only {rows.list_keys(first)}"
        return "text", {"reason": reason}
    return "text", {"reason": "JSON without rows" if is_named_json else ""}
