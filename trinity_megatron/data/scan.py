"""The first pass over the sources: hash and size of every document."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trinity_megatron.data.corpus import Document, ReadOptions, Skipped, SourceFile, read_documents
from trinity_megatron.data.left_out import LeftOut


@dataclass(frozen=True)
class Corpus:
    """The documents of the sources.

    Attributes:
        files: The source files.
        left_out: Files, folders and rows that are not part of the corpus.
        options: Options for reading documents from files.
        keys: Hash of the text of every document, uint64, ``[num_documents]``.
        sizes: UTF-8 bytes of every document, int64, ``[num_documents]``.
    """

    files: list[SourceFile]
    left_out: LeftOut
    options: ReadOptions
    keys: np.ndarray
    sizes: np.ndarray

    def documents(self) -> Iterator[Document]:
        """Read the documents again, in the same order."""
        entries = read_documents(self.files, self.options)
        return (entry for entry in entries if isinstance(entry, Document))


def scan(
    files: list[SourceFile], skipped: list[Skipped], options: ReadOptions, max_left_out: float
) -> Corpus:
    """Read all documents once, and check how much is left out.

    Args:
        files: The source files.
        skipped: Files and folders that were found but are not source files.
        options: Options for reading documents from files.
        max_left_out: Largest share, by bytes, that may be left out.

    Raises:
        UserError: More is left out, or a file cannot be read.
    """
    keys, sizes, left_out = array("Q"), array("q"), LeftOut(skipped)
    for entry in read_documents(files, options):
        if isinstance(entry, Skipped):
            left_out.add(entry)
            continue
        key, size = hash_text(entry.text)
        keys.append(key)
        sizes.append(size)
    left_out.check(files, max_left_out)
    left_out.report()
    return Corpus(files, left_out, options, np.array(keys, np.uint64), np.array(sizes, np.int64))


def hash_text(text: str) -> tuple[int, int]:
    """Hash of a text, 64 bits, and its UTF-8 bytes."""
    content = text.encode("utf-8")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big"), len(content)
