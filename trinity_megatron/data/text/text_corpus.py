"""The files of a corpus of raw text: found and known by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from trinity_megatron.data.address import StoredAt, list_address
from trinity_megatron.data.corpus import ReadOptions, Skipped, SourceFile, find_files, read_rows
from trinity_megatron.data.rows import RowError
from trinity_megatron.data.sources import naming, recognize_files
from trinity_megatron.data.streams import StoredFile
from trinity_megatron.data.tables import count_parquet_rows
from trinity_megatron.errors import MissingInputError, UserError

# Files up to this size are read whole for their fingerprint, of larger ones as many blocks.
_WHOLE_BYTES = 2**18
_BLOCKS, _BLOCK_BYTES = 16, 2**12
_BLOCKS_AT_ADDRESS = 2  # each is a request
_REQUESTS = 32
# As ``prepare-data --max-left-out``.
_MAX_LEFT_OUT = 0.1


@dataclass(frozen=True)
class TextFile:
    """A file of a corpus.

    Attributes:
        source: Where it lies and what it holds.
        rows: Rows of a parquet file; 0 for others.
        content: Fingerprint of its content.
    """

    source: SourceFile
    rows: int
    content: str


@dataclass(frozen=True)
class TextCorpus:
    """The files of a corpus of raw text.

    Attributes:
        name: Of the corpus.
        key: That names it in errors.
        files: In the order of their names.
        options: How documents are found in them.
        skips_bad_rows: Whether rows that hold no text are left out, and not an error.
    """

    name: str
    key: str
    files: tuple[TextFile, ...] = field(repr=False)
    options: ReadOptions
    skips_bad_rows: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of all files on the disk."""
        return sum(file.source.num_bytes for file in self.files)

    @cached_property
    def content(self) -> str:
        """Fingerprint of the files and of how they are read; not of where they lie."""
        files = [(PurePosixPath(file.source.name).name, file.content) for file in self.files]
        options = {"text_key": self.options.text_key, "split_on": self.options.split_on}
        words = json.dumps([options, files], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()


def find_text(
    path: Path | StoredAt,
    *,
    name: str,
    key: str,
    options: ReadOptions,
    skips_bad_rows: bool = False,
) -> TextCorpus:
    """Find the files of a corpus, and look at each: its first row, and some blocks.

    Args:
        path: A file, a folder or an address of one.
        name: Of the corpus.
        key: That names it in errors.
        options: How documents are found in files.
        skips_bad_rows: Whether rows that hold no text are left out.

    Raises:
        UserError: Nothing is there, a file cannot be read or lacks the field of the text, or too
            much is left out; names the file and the remedy.
    """
    try:
        files, skipped, apply = _find(path, key, options)
        kept = [file for file in files if file.num_bytes and file.format.kind != "unread"]
        _check_left_out(path, files, kept, skipped)
        _check_separator(kept, options)
        found = tuple(apply(lambda file: _describe(file, options, skips_bad_rows), kept))
    except MissingInputError:
        raise
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return TextCorpus(name, key, found, options, skips_bad_rows)


def _find(
    path: Path | StoredAt, key: str, options: ReadOptions
) -> tuple[list[SourceFile], list[Skipped], Any]:
    if isinstance(path, Path):
        files, skipped = find_files([path], options=options)
        return files, skipped, map
    below = list(_files_at(path, key))
    pool = ThreadPoolExecutor(_REQUESTS)
    return recognize_files(below, options, pool.map), [], pool.map


def _files_at(root: StoredAt, key: str) -> Iterator[SourceFile]:
    for relative, stored in list_address(root.address, f"{key}.path"):
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.split("/"))
        if stored.num_bytes and not hidden:
            name = f"{root.name}/{relative}".rstrip("/")
            yield SourceFile(name, stored, not relative, stored.num_bytes, 0)


def _check_left_out(
    path: Path | StoredAt,
    files: Sequence[SourceFile],
    kept: Sequence[SourceFile],
    skipped: Iterable[Skipped],
) -> None:
    """Refuse a corpus without text, and one of which much could be text and is not read."""
    if not kept:
        first = f"{files[0].path} is {files[0].format.reason or 'empty'}"
        raise UserError(
            f"{path} holds no text: {len(files)} files that are empty or not read; the first, "
            f"{first}. Remedy: name JSON Lines, parquet or text files, or folders of them."
        )
    unread = [file for file in files if file.format.could_be_text and file not in kept]
    lost = sum(file.num_bytes for file in unread)
    share = lost / (lost + sum(file.num_bytes for file in kept))
    if share > _MAX_LEFT_OUT:
        raise UserError(
            f"{len(unread)} files, {share:.0%} of the bytes, would be left out; the first, "
            f"{unread[0].path}, is {unread[0].format.reason}. Remedy: convert them to JSON Lines, "
            "parquet or text in UTF-8, or move them away."
        )
    # Their size is not known.
    unopened = [entry for entry in skipped if entry.could_be_text]
    share = len(unopened) / (len(unopened) + len(kept))
    if share > _MAX_LEFT_OUT:
        raise UserError(
            f"{len(unopened)} files, {share:.0%} of them, would be left out; the first, "
            f"{unopened[0].name}: {unopened[0].reason}. Remedy: let this user read them, or move "
            "them away."
        )


def _check_separator(files: Sequence[SourceFile], options: ReadOptions) -> None:
    """Refuse a separator that occurs in no text: each whole file would be a document."""
    texts = [file for file in files if file.format.kind == "text"]
    if options.split_on is None or not texts:
        return
    separated: set[str] = set()
    for file in texts:
        with naming(file.path):
            for _ in read_rows(file, options, separated):
                if separated:
                    return
    raise UserError(
        f"split_on {options.split_on!r} occurs in no text file; the first is {texts[0].path}. "
        "Remedy: correct split_on, or leave it out."
    )


def _describe(file: SourceFile, options: ReadOptions, skips_bad_rows: bool) -> TextFile:
    with naming(file.path):
        if file.format.kind != "text":
            where, _, text = next(read_rows(file, options, set()), ("", 0, ""))
            if isinstance(text, RowError) and not skips_bad_rows:
                raise UserError(
                    f"{file.path}, {where}: {text}. Remedy: mend it, or text_key: NAME."
                )
        is_table = file.format.kind == "parquet"
        rows = count_parquet_rows(file.path, options.text_key) if is_table else 0
        return TextFile(file, rows, fingerprint(file.path, file.num_bytes))


def fingerprint(path: StoredFile, num_bytes: int) -> str:
    """SHA-256 of a small file; of the size and some blocks of a larger one.

    At an address, what the file system says of the content stands for most of the blocks.
    """
    digest = hashlib.sha256(num_bytes.to_bytes(8, "little"))
    blocks = _BLOCKS
    if isinstance(path, StoredAt):
        digest.update(path.version.encode())
        blocks = _BLOCKS_AT_ADDRESS
    with path.open("rb") as stream:
        if num_bytes <= _WHOLE_BYTES:
            digest.update(stream.read())
            return digest.hexdigest()
        for block in range(blocks):
            stream.seek((num_bytes - _BLOCK_BYTES) * block // (blocks - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
