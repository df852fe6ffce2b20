"""The two kinds of tasks of a preparation: looking at some files, and encoding their documents.

A task gets its files by its number, and leaves its result under one name at once.  What is wrong
with the sources is a result too: an engine would only log it.
"""

from __future__ import annotations

import functools
import pickle
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trinity_megatron.data.cluster.result_file import load_result
from trinity_megatron.data.corpus import (
    Document,
    ReadOptions,
    Skipped,
    SourceFile,
    hash_file,
    is_unchanged,
    read_documents,
)
from trinity_megatron.data.inputs import DataInputs
from trinity_megatron.data.manifest import SplitSummary
from trinity_megatron.data.output_folder import SPLITS
from trinity_megatron.data.scan import hash_text
from trinity_megatron.errors import UserError

COUNTS_NAME, SUMMARY_NAME = "counts.npy", "summary.pickle"


@dataclass
class Scanned:
    """What a task found in its files.

    Attributes:
        digests: SHA-256 of each file.
        skipped: Rows and files that are not part of the corpus, in their order.
        num_documents: Documents of each file.
        keys: See ``Corpus``, uint64 ``[num_documents]``.
        sizes: See ``Corpus``, int64 ``[num_documents]``.
        split_files: Text files in which the separator occurs.
        problem: What is wrong with the files, for the user; the rest is empty then.
    """

    digests: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    num_documents: list[int] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    split_files: set[str] = field(default_factory=set)
    problem: str | None = None


@dataclass(frozen=True)
class ScanTask:
    """Hashes and sizes of the documents of some files.

    Attributes:
        groups: The files of each task.
        options: How documents are found.
        folder: For the results.
    """

    groups: Sequence[Sequence[SourceFile]]
    options: ReadOptions
    folder: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Do the task of a number."""
        try:
            found = self._scan(self.groups[rank])
        except UserError as error:
            found = Scanned(problem=str(error))
        save_whole(self.result(rank), lambda path: path.write_bytes(pickle.dumps(found)))

    def result(self, rank: int) -> Path:
        """Where the result of a task lies."""
        return self.folder / f"{rank:05d}.pickle"

    def load(self, rank: int) -> Scanned:
        """The result of a task."""
        return load_result(self.result(rank))

    def _scan(self, files: Sequence[SourceFile]) -> Scanned:
        found = Scanned()
        keys: list[int] = []
        sizes: list[int] = []
        for file in files:
            before = len(keys)
            for entry in read_documents([file], self.options, found.split_files):
                if isinstance(entry, Skipped):
                    found.skipped.append(entry)
                    continue
                key, size = hash_text(entry.text)
                keys.append(key)
                sizes.append(size)
            found.num_documents.append(len(keys) - before)
            found.digests.append(hash_file(file.path))
        found.keys, found.sizes = np.array(keys, np.uint64), np.array(sizes, np.int64)
        return found


@dataclass(frozen=True)
class EncodeTask:
    """The splits of the documents of some files.

    Attributes:
        groups: The files of each task.
        starts: Number of the first document of each task in the corpus.
        options: How documents are found.
        inputs: Inputs of the data.
        tokenizer: Its JSON.
        held_out: File with whether each document is validation, bool ``[num_documents]``.
        folder: For the results: a folder for each task.
    """

    groups: Sequence[Sequence[SourceFile]]
    starts: Sequence[int]
    options: ReadOptions
    inputs: DataInputs
    tokenizer: str
    held_out: Path
    folder: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Do the task of a number."""

        def write(folder: Path) -> None:
            folder.mkdir()
            try:
                summaries: Any = self._encode(folder, rank)
            except UserError as error:
                summaries = str(error)
            (folder / SUMMARY_NAME).write_bytes(pickle.dumps(summaries))

        save_whole(self.result(rank), write)

    def result(self, rank: int) -> Path:
        """Where the result of a task lies."""
        return self.folder / f"{rank:05d}"

    def load(self, rank: int) -> tuple[list[SplitSummary], list[np.ndarray]] | str:
        """Summary and token counts of both splits; or what is wrong with the files."""
        folder = self.result(rank)
        summaries = load_result(folder / SUMMARY_NAME)
        if isinstance(summaries, str):
            return summaries
        return summaries, [np.load(folder / f"{split}.{COUNTS_NAME}") for split in SPLITS]

    def _encode(self, folder: Path, rank: int) -> list[SplitSummary]:
        from tokenizers import Tokenizer

        from trinity_megatron.data.encode import SplitWriter, write_rows

        files = self.groups[rank]
        writers = [SplitWriter(folder / split, self.inputs.vocab_size) for split in SPLITS]
        held_out = np.load(self.held_out, mmap_mode="r")[self.starts[rank] :]
        documents = (
            entry
            for entry in read_documents(files, self.options, set())
            if isinstance(entry, Document)
        )
        rows = (
            (document, bool(is_held_out), len(document.text.encode("utf-8")))
            for document, is_held_out in zip(documents, held_out, strict=False)
        )
        tokenizer = Tokenizer.from_str(self.tokenizer)
        write_rows(rows, writers, tokenizer, self.inputs, workers=1)
        for file in files:
            if not is_unchanged(file):
                raise UserError(f"source {file.path} changed while it was read; run again")
        for split, writer in zip(SPLITS, writers, strict=True):
            np.save(folder / f"{split}.{COUNTS_NAME}", writer.counts)
        return [writer.finish() for writer in writers]


def save_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file or folder beside its place, and rename it.

    A task may run twice: an engine that loses sight of one starts it again.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        remove = shutil.rmtree if temporary.is_dir() else functools.partial(Path.unlink)
        if temporary.exists():
            remove(temporary)
