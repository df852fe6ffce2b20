"""The documents of a corpus: their text, in an order that does not depend on the machine."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from trinity_megatron.data import rows, tables
from trinity_megatron.data.formats import ReadOptions
from trinity_megatron.data.sources import (
    Skipped,
    SourceFile,
    describe_not_text,
    describe_unreadable,
    find_files,
    naming,
)
from trinity_megatron.data.streams import StoredFile, open_stream, read_whole, split_stream
from trinity_megatron.errors import UserError

__all__ = [
    "Document",
    "ReadOptions",
    "Skipped",
    "SourceFile",
    "find_files",
    "hash_file",
    "is_unchanged",
    "read_documents",
]

_DEFAULTS = ReadOptions()


@dataclass(frozen=True)
class Document:
    """One document: a text file or a part of it, or one row."""

    name: str
    text: str


def hash_file(path: StoredFile) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(cast(io.BufferedReader, stream), "sha256").hexdigest()
    except OSError as error:
        raise UserError(describe_unreadable(path, error)) from error


def is_unchanged(file: SourceFile) -> bool:
    """Whether the file still has the size and modification time with which it was found."""
    try:
        status = file.path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.num_bytes, file.modified_ns)


def read_documents(
    files: Sequence[SourceFile],
    options: ReadOptions = _DEFAULTS,
    split_files: set[str] | None = None,
) -> Iterator[Document | Skipped]:
    """Read the documents of all files in order.

    Args:
        files: The files.
        options: How documents are found.
        split_files: Gets the names of the text files in which ``options.split_on`` occurs, for
            :func:`check_separator` when all files are read.  Without it these are all files.

    Yields:
        A document, or an entry for what holds none: an empty file or row, a bad row as long as
        ``options.skip_bad_rows`` allows, and, for a file found in a folder, one that is not text.

    Raises:
        UserError: If a file that was named itself is not UTF-8 text, a file is damaged or cannot
            be read, more rows are bad than may be, or ``options.split_on`` occurs nowhere.
    """
    num_bad = 0
    are_all = split_files is None
    split_files = set() if split_files is None else split_files
    for file in files:
        with naming(file.path):
            for entry in _read_file(file, options, split_files):
                if isinstance(entry, Document) and not entry.text:
                    is_row = entry.name != file.name
                    entry = (
                        Skipped(entry.name, "empty", file.name)
                        if is_row
                        else _skip_file(file, "empty")
                    )
                elif isinstance(entry, _BadRow):
                    num_bad += 1
                    if num_bad > options.skip_bad_rows:
                        raise UserError(_bad_row(file, entry, options.skip_bad_rows))
                    entry = Skipped(entry.name, f"bad row: {entry.problem}", file.name)
                yield entry
    if are_all:
        check_separator(options, split_files)


def check_separator(options: ReadOptions, split_files: set[str]) -> None:
    """Refuse a separator that occurs nowhere.

    Raises:
        UserError: No file has it.
    """
    if options.split_on is not None and not split_files:
        raise UserError(
            f"split_on {options.split_on!r} occurs in no text file; correct --split-on, or leave "
            "it out"
        )


@dataclass(frozen=True)
class _BadRow:
    name: str
    where: str
    problem: str


def _bad_row(file: SourceFile, row: _BadRow, limit: int) -> str:
    skipped = f" beyond the {limit} that --skip-bad-rows allows" if limit else ""
    return (
        f"source {file.path}, {row.where}: {row.problem}; correct this row{skipped}, leave the "
        f"file out, or leave bad rows out with --skip-bad-rows {limit + 1} or more"
    )


def describe_unread(file: SourceFile) -> Skipped:
    """The entry of a file that is not read."""
    return _skip_file(file, file.format.reason, could_be_text=file.format.could_be_text)


def _skip_file(file: SourceFile, reason: str, *, could_be_text: bool = False) -> Skipped:
    return Skipped(
        file.name,
        reason,
        num_bytes=file.num_bytes,
        could_be_text=could_be_text,
        is_source_file=True,
    )


def _read_file(
    file: SourceFile, options: ReadOptions, split_files: set[str]
) -> Iterator[Document | Skipped | _BadRow]:
    if file.format.kind == "unread":
        yield describe_unread(file)
    elif file.format.kind == "text" and options.split_on is None:
        yield _read_text(file)
    else:
        for where, number, text in read_rows(file, options, split_files):
            name = f"{file.name}:{number}"
            if isinstance(text, str):
                yield Document(name, text)
            else:
                yield _BadRow(name, where, str(text))


def read_rows(file: SourceFile, options: ReadOptions, split_files: set[str]) -> Iterator[rows.Row]:
    """Read the rows of a file, or the pieces of a text file that is split.

    Args:
        file: Of rows, or of text with ``options.split_on``.
        options: How documents are found.
        split_files: Gets the name of a text file in which the separator occurs.

    Raises:
        DamagedFileError: The file is damaged.
        MissingColumnError: A table lacks the column of the text.
        OSError: It cannot be read.
    """
    key, found = options.text_key, file.format
    if found.kind == "parquet":
        yield from tables.read_parquet(file.path, key)
    elif found.kind == "arrow_file":
        yield from tables.read_arrow_file(file.path, key)
    elif found.kind == "arrow_stream":
        yield from tables.read_arrow_stream(file.path, key)
    else:
        with open_stream(file.path, found.layers, found.encoding) as stream:
            if found.kind == "json_lines":
                yield from rows.read_json_lines(stream, key)
            elif found.kind == "json_values":
                yield from rows.read_json_values(stream, key)
            elif found.kind == "csv":
                yield from rows.read_csv(stream, key, found.delimiter)
            else:
                assert options.split_on is not None
                pieces = split_stream(stream, options.split_on)
                for number, (piece, is_separated) in enumerate(pieces, start=1):
                    if is_separated:
                        split_files.add(file.name)
                    yield f"document {number}", number, rows.decode_text(piece)


def _read_text(file: SourceFile) -> Document | Skipped:
    with open_stream(file.path, file.format.layers, file.format.encoding) as stream:
        content = read_whole(stream)
    text = rows.decode_text(content)
    if isinstance(text, str):
        return Document(file.name, text)
    if file.is_explicit:
        raise UserError(describe_not_text(file.path, str(text)))
    return _skip_file(file, str(text), could_be_text=True)  # its beginning is text
