"""Encoding a corpus as Megatron's indexed data: training and validation splits."""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from trinity_megatron.data.corpus import Document
from trinity_megatron.data.encode_pool import encode_batches
from trinity_megatron.data.given_tokenizer import GivenTokenizer
from trinity_megatron.data.inputs import DataInputs
from trinity_megatron.data.manifest import SplitSummary
from trinity_megatron.data.output_folder import SPLITS
from trinity_megatron.data.scan import Corpus
from trinity_megatron.data.split import (
    MIN_SPLIT_TOKENS,
    WANTED_VALIDATION_TOKENS,
    select_validation,
)
from trinity_megatron.data.tokenizer import END_OF_TEXT, train_tokenizer
from trinity_megatron.data.unigram import unigram_entropy

logger = logging.getLogger(__name__)

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 4 * 2**20


@dataclass(frozen=True)
class EncodedSplits:
    """The result of encoding a corpus.

    Attributes:
        tokenizer: The tokenizer, trained or given.
        train: Summary of the training split.
        validation: Summary of the validation split.
        is_enlarged: Whether validation was enlarged to ``WANTED_VALIDATION_TOKENS``.
    """

    tokenizer: Tokenizer
    train: SplitSummary
    validation: SplitSummary
    is_enlarged: bool


class SplitEncoder(Protocol):
    """Writes both splits of a corpus."""

    def __call__(
        self,
        folder: Path,
        inputs: DataInputs,
        tokenizer: Tokenizer,
        corpus: Corpus,
        is_validation: np.ndarray,
    ) -> tuple[SplitSummary, SplitSummary]:
        """Write the splits and return their summaries: training, validation."""
        ...


def write_splits(
    folder: Path,
    inputs: DataInputs,
    corpus: Corpus,
    given: GivenTokenizer | None,
    encode: SplitEncoder,
) -> EncodedSplits:
    """Write both splits.

    If the validation split has too few tokens, encode again with a larger one, until it has enough
    or cannot grow.

    Args:
        folder: Folder to write to.
        inputs: Inputs of the data.
        corpus: The documents.
        given: A given tokenizer; None to train one.
        encode: Encodes the documents.

    Raises:
        UserError: The corpus is too small to split, or to train the tokenizer.
    """
    min_bytes, wanted_bytes = MIN_SPLIT_TOKENS, 0  # a token covers at least one byte
    written: EncodedSplits | None = None
    before = np.empty(0, bool)
    while True:
        is_validation = select_validation(
            corpus.keys,
            corpus.sizes,
            fraction=inputs.validation_fraction,
            min_bytes=min_bytes,
            wanted_bytes=wanted_bytes,
        )
        if written is not None and np.array_equal(is_validation, before):
            return written
        if written is not None:
            logger.info("%d validation tokens are few; holding out more", written.validation.tokens)
        before = is_validation
        tokenizer = given.tokenizer if given else _train(corpus, is_validation, inputs.vocab_size)
        train, validation = encode(folder, inputs, tokenizer, corpus, is_validation)
        written = EncodedSplits(tokenizer, train, validation, is_enlarged=wanted_bytes > 0)
        if validation.tokens >= WANTED_VALIDATION_TOKENS:
            return written
        if validation.tokens < MIN_SPLIT_TOKENS:
            min_bytes = 2 * validation.bytes
        else:
            wanted = validation.bytes / validation.tokens * WANTED_VALIDATION_TOKENS
            wanted_bytes = max(math.ceil(1.02 * wanted), wanted_bytes)


def _train(corpus: Corpus, is_validation: np.ndarray, vocab_size: int) -> Tokenizer:
    """Train the tokenizer on the training split only."""
    with _progress("Training the tokenizer", int(corpus.sizes.sum())) as advance:

        def texts() -> Iterator[str]:
            rows = zip(corpus.documents(), is_validation, corpus.sizes, strict=True)
            for document, held_out, size in rows:
                advance(int(size))
                if not held_out:
                    yield document.text

        return train_tokenizer(texts(), vocab_size=vocab_size)


def encode_splits(
    folder: Path,
    inputs: DataInputs,
    tokenizer: Tokenizer,
    corpus: Corpus,
    is_validation: np.ndarray,
    *,
    workers: int | None = None,
) -> tuple[SplitSummary, SplitSummary]:
    """Encode a corpus on this machine, see :func:`encode_batches`."""
    rows = zip(corpus.documents(), is_validation, corpus.sizes, strict=True)
    writers = [SplitWriter(folder / split, inputs.vocab_size) for split in SPLITS]
    with _progress("Encoding", int(corpus.sizes.sum())) as advance:
        write_rows(rows, writers, tokenizer, inputs, workers=workers, advance=advance)
    train, validation = (writer.finish() for writer in writers)
    return train, validation


Row = tuple[Document, bool, int]


def write_rows(
    rows: Iterable[Row],
    writers: Sequence["SplitWriter"],
    tokenizer: Tokenizer,
    inputs: DataInputs,
    *,
    workers: int | None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Encode documents and append each to its split.

    Args:
        rows: Document, whether it is held out, and its bytes.
        writers: Of training and validation.
        tokenizer: The tokenizer.
        inputs: Inputs of the data.
        workers: See :func:`encode_batches`.
        advance: Is told the bytes of each document.
    """
    waiting: deque[list[Row]] = deque()

    def texts() -> Iterator[list[str]]:
        for batch in _batches(rows):
            waiting.append(batch)
            yield [document.text for document, _, _ in batch]

    encoded = encode_batches(
        texts(),
        tokenizer,
        eos_token=inputs.eos_token or END_OF_TEXT,
        dtype=writers[0].dtype,
        workers=workers,
    )
    for tokens, lengths in encoded:
        ends = np.cumsum(lengths)
        batch = waiting.popleft()
        for (_, held_out, size), start, end in zip(batch, ends - lengths, ends, strict=True):
            writers[int(held_out)].add(tokens[start:end], int(size))
            advance(int(size))


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row[0].text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class SplitWriter:
    """Writes one split and counts its documents, bytes and tokens.

    Args:
        prefix: Of ``.bin`` and ``.idx``.
        vocab_size: Number of tokens of the tokenizer.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        # Imported here because it takes seconds: megatron.core imports torch.
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._prefix = prefix
        self.dtype = DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self.dtype)
        self.counts = np.zeros(vocab_size, np.int64)
        self._documents = 0
        self._bytes = 0

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Append a document, including its end-of-text token."""
        self._builder.add_document(tokens, [len(tokens)])
        np.add.at(
            self.counts, tokens, 1
        )  # bincount would allocate the vocabulary for each document
        self._documents += 1
        self._bytes += num_bytes

    def add_shard(self, prefix: Path, counts: np.ndarray, summary: SplitSummary) -> None:
        """Append the documents that another writer has written.

        Args:
            prefix: Of its files.
            counts: How often each token occurs in it, int64 ``[vocab_size]``.
            summary: Its own.
        """
        if summary.documents:
            self._builder.add_index(str(prefix))
        self.counts += counts
        self._documents += summary.documents
        self._bytes += summary.bytes

    def finish(self) -> SplitSummary:
        """Close the files and return the summary."""
        self._builder.finalize(f"{self._prefix}.idx")
        tokens = int(self.counts.sum())
        # A shard of a few documents may have none of this split.
        entropy = unigram_entropy(self.counts) if tokens else 0.0
        return SplitSummary(self._documents, tokens, self._bytes, entropy)


@contextlib.contextmanager
def _progress(description: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over bytes on a terminal, and log the start and the end."""
    console = Console(stderr=True)
    logger.info("%s: %.1f MB", description, num_bytes / 1e6)
    start = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(description, total=num_bytes)
        yield lambda done: progress.advance(task, done)
    logger.info("%s: %.1f s", description, time.monotonic() - start)
