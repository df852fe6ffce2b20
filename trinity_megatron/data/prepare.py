"""Prepare a corpus for Megatron: tokenizer, indexed training and validation data, manifest."""

import contextlib
import errno
import hashlib
import logging
import math
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from trinity_megatron.data.corpus import (
    Document,
    ReadOptions,
    Skipped,
    SourceFile,
    find_files,
    hash_file,
    is_unchanged,
    read_documents,
)
from trinity_megatron.data.left_out import LeftOut, check_formats
from trinity_megatron.data.manifest import (
    MANIFEST_NAME,
    READER_VERSION,
    DataInputs,
    DataManifest,
    SplitSummary,
    UnsupportedFormatError,
    load_manifest,
    save_manifest,
    sync_file,
)
from trinity_megatron.data.split import (
    MIN_SPLIT_TOKENS,
    WANTED_VALIDATION_TOKENS,
    select_validation,
)
from trinity_megatron.data.tokenizer import (
    END_OF_TEXT,
    PRE_TOKENIZER_VERSION,
    GivenTokenizer,
    check_vocab_size,
    copy_tokenizer,
    encode_documents,
    get_eod_id,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from trinity_megatron.errors import UserError

__all__ = [
    "DataManifest",
    "MIN_SPLIT_TOKENS",
    "ReadOptions",
    "load_manifest",
    "prepare_data",
    "select_validation",
    "unigram_entropy",
]

logger = logging.getLogger(__name__)

_SPLITS = ("train", "validation")
_DATA_FILES = [f"{split}{suffix}" for split in _SPLITS for suffix in (".bin", ".idx")]
# Everything that may lie in a folder of ours, Megatron's index cache beside the data included.
_OWN_NAMES = {*_DATA_FILES, "tokenizer", MANIFEST_NAME, f".{MANIFEST_NAME}.tmp", "cache"}
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 4 * 2**20


_DEFAULTS = ReadOptions()


@dataclass(frozen=True)
class _Corpus:
    """The sources after a first reading.

    Attributes:
        files: The source files.
        left_out: Files, folders and rows that are not read.
        options: How documents are found in files.
        keys: Hash of every document's text, uint64, ``[num_documents]``.
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


def prepare_data(
    out: Path,
    sources: Sequence[Path] = (),
    *,
    vocab_size: int = 4096,
    validation_fraction: float = 0.05,
    tokenizer: Path | None = None,
    options: ReadOptions = _DEFAULTS,
    max_left_out: float = 0.1,
) -> DataManifest:
    """Write a corpus as Megatron's indexed data, with a tokenizer trained on it or a given one.

    The folder appears whole or not at all. A whole folder made from the same inputs is kept as it
    is; a half-written one is replaced.

    Args:
        out: The folder to write: ``train`` and ``validation`` (``.bin``, ``.idx``),
            ``tokenizer/`` and ``manifest.json``.
        sources: Text and source code; JSON, CSV, parquet and Arrow files whose rows have a text;
            any of them compressed; and folders of them. Without any, Python's standard library.
        vocab_size: Number of tokens of the tokenizer to train; without effect on a given one.
        validation_fraction: Share of the distinct documents that goes to validation; more if that
            is fewer than one document or ``MIN_SPLIT_TOKENS`` tokens, or fewer than
            ``WANTED_VALIDATION_TOKENS`` tokens and a tenth of the text.
        tokenizer: Folder of a Hugging Face tokenizer to use as it is, such as a released model's.
            Its ``eos_token`` ends every document. Without it a tokenizer is trained.
        options: How documents are found in files.
        max_left_out: Largest share, by bytes, of the files that could be text and are not read.

    Raises:
        ValueError: If an argument or a source is unusable, more is left out, the corpus is too
            small to split or to fill the vocabulary, or ``out`` holds other data.
    """
    if tokenizer is None:
        check_vocab_size(vocab_size)
    if not 0 < validation_fraction < 1:
        raise UserError(
            f"validation_fraction {validation_fraction} is not between 0 and 1; 0.05 is usual"
        )
    if not 0 <= max_left_out <= 1:
        raise UserError(f"max_left_out {max_left_out} is not between 0 and 1; 0.1 is usual")
    out = Path(out).resolve()
    _check_out(out)
    given = None if tokenizer is None else _load_given(tokenizer, out)
    files, skipped = find_files(sources, exclude=out, options=options)
    check_formats(skipped, files, max_left_out)
    hashes = sorted((file.name, hash_file(file.path)) for file in files)
    inputs = DataInputs(
        vocab_size=int(vocab_size) if given is None else given.vocab_size,
        validation_fraction=float(validation_fraction),
        min_split_tokens=MIN_SPLIT_TOKENS,
        pre_tokenizer=PRE_TOKENIZER_VERSION,
        sources=tuple(hashes),
        tokenizer=None if given is None else given.fingerprint,
        eos_token=None if given is None else given.eos_token,
        reader=None if all(file.format.is_as_before for file in files) else READER_VERSION,
        text_key=None if options.text_key == _DEFAULTS.text_key else options.text_key,
        split_on=options.split_on,
        skip_bad_rows=options.skip_bad_rows or None,
        plain_text=options.plain_text or None,
    )
    existing = _find_existing(out, inputs)
    if existing is not None:
        return existing
    with _locked(out):
        # Another process may have finished the same while this one waited.
        existing = _find_existing(out, inputs)
        if existing is not None:
            return existing
        _remove_half_written(out)
        corpus = _scan(files, skipped, options, max_left_out)
        return _build(out, inputs, corpus, given)


def unigram_entropy(counts: Sequence[int] | np.ndarray) -> float:
    """Entropy of token frequencies in nats per token, ``-sum(p log p)`` with ``p = counts / sum``.

    Args:
        counts: How often each token occurs, ``[vocab_size]``.

    Raises:
        ValueError: If a count is negative or none is positive.
    """
    values = np.asarray(counts, dtype=np.float64)
    if values.size == 0 or values.min() < 0 or values.sum() <= 0:
        raise ValueError("counts must be non-negative with a positive sum; count some tokens first")
    shares = values[values > 0] / values.sum()
    return float(max(0.0, -np.sum(shares * np.log(shares))))


def _load_given(folder: Path, out: Path) -> GivenTokenizer:
    folder = Path(folder).resolve()
    if folder.is_relative_to(out):
        raise UserError(
            f"tokenizer {folder} lies inside out {out}, which is written anew; pass --tokenizer "
            "with the folder it came from or a copy elsewhere, or pass another --out"
        )
    return load_tokenizer(folder)


def _build(
    out: Path, inputs: DataInputs, corpus: _Corpus, given: GivenTokenizer | None
) -> DataManifest:
    building = out.with_name(f"{_building_prefix(out)}{uuid.uuid4().hex}")
    building.mkdir()
    try:
        manifest = _write(building, inputs, corpus, given)
        for file in corpus.files:
            if not is_unchanged(file):
                raise UserError(f"source {file.path} changed while it was read; run again")
        save_manifest(manifest)
        return _publish(building, out, inputs)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _scan(
    files: list[SourceFile], skipped: list[Skipped], options: ReadOptions, max_left_out: float
) -> _Corpus:
    keys, sizes, left_out = array("Q"), array("q"), LeftOut(skipped)
    for entry in read_documents(files, options):
        if isinstance(entry, Skipped):
            left_out.add(entry)
            continue
        content = entry.text.encode("utf-8")
        keys.append(int.from_bytes(hashlib.sha256(content).digest()[:8], "big"))
        sizes.append(len(content))
    left_out.check(files, max_left_out)
    left_out.report()
    return _Corpus(files, left_out, options, np.array(keys, np.uint64), np.array(sizes, np.int64))


@dataclass(frozen=True)
class _Written:
    """The encoded splits of a corpus, and whether validation was enlarged to what is wanted."""

    tokenizer: Tokenizer
    train: SplitSummary
    validation: SplitSummary
    is_enlarged: bool


def _write(
    folder: Path, inputs: DataInputs, corpus: _Corpus, given: GivenTokenizer | None
) -> DataManifest:
    """Write tokenizer and splits."""
    written = _write_splits(folder, inputs, corpus, given)
    if written.train.tokens < MIN_SPLIT_TOKENS:
        raise UserError(
            f"sources leave {written.train.tokens} tokens for training, fewer than "
            f"{MIN_SPLIT_TOKENS}; add documents, or cut the text into several"
        )
    if given is None:
        save_tokenizer(written.tokenizer, folder / "tokenizer")
    else:
        copy_tokenizer(given, folder / "tokenizer")
    tokenizer_files = sorted(path.name for path in (folder / "tokenizer").iterdir())
    names = [*_DATA_FILES, *(f"tokenizer/{name}" for name in tokenizer_files)]
    for name in names:
        sync_file(folder / name)
    return DataManifest(
        path=folder,
        inputs=_enlarged(inputs) if written.is_enlarged else inputs,
        eod_id=get_eod_id(written.tokenizer, inputs.eos_token or END_OF_TEXT),
        tokenizer_fingerprint=hash_file(folder / "tokenizer" / "tokenizer.json"),
        train=written.train,
        validation=written.validation,
        skipped=corpus.left_out.entries(),
        files={name: (folder / name).stat().st_size for name in names},
    )


def _write_splits(
    folder: Path, inputs: DataInputs, corpus: _Corpus, given: GivenTokenizer | None
) -> _Written:
    """Encode; validation grows until it holds enough tokens, or no more may be held out."""
    min_bytes, wanted_bytes = MIN_SPLIT_TOKENS, 0  # a token covers a byte or more
    written: _Written | None = None
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
        train, validation = _encode(folder, inputs, tokenizer, corpus, is_validation)
        written = _Written(tokenizer, train, validation, is_enlarged=wanted_bytes > 0)
        if validation.tokens >= WANTED_VALIDATION_TOKENS:
            return written
        if validation.tokens < MIN_SPLIT_TOKENS:
            min_bytes = 2 * validation.bytes
        else:
            wanted = validation.bytes / validation.tokens * WANTED_VALIDATION_TOKENS
            wanted_bytes = max(math.ceil(1.02 * wanted), wanted_bytes)


def _enlarged(inputs: DataInputs) -> DataInputs:
    """The inputs of a folder whose validation split was enlarged; of others they stay as before."""
    return replace(inputs, validation_tokens=WANTED_VALIDATION_TOKENS)


def _train(corpus: _Corpus, is_validation: np.ndarray, vocab_size: int) -> Tokenizer:
    """Train on the training documents only, so that validation stays unseen."""
    with _progress("Training the tokenizer", int(corpus.sizes.sum())) as advance:

        def texts() -> Iterator[str]:
            rows = zip(corpus.documents(), is_validation, corpus.sizes, strict=True)
            for document, held_out, size in rows:
                advance(int(size))
                if not held_out:
                    yield document.text

        return train_tokenizer(texts(), vocab_size=vocab_size)


def _encode(
    folder: Path,
    inputs: DataInputs,
    tokenizer: Tokenizer,
    corpus: _Corpus,
    is_validation: np.ndarray,
) -> tuple[SplitSummary, SplitSummary]:
    eos_token = inputs.eos_token or END_OF_TEXT
    writers = [_SplitWriter(folder / split, inputs.vocab_size) for split in _SPLITS]
    rows = zip(corpus.documents(), is_validation, corpus.sizes, strict=True)
    with _progress("Encoding", int(corpus.sizes.sum())) as advance:
        for batch in _batches(rows):
            texts = [document.text for document, _, _ in batch]
            encoded = encode_documents(tokenizer, texts, eos_token=eos_token)
            for (_, held_out, size), ids in zip(batch, encoded, strict=True):
                writers[int(held_out)].add(ids, int(size))
                advance(int(size))
    train, validation = (writer.finish() for writer in writers)
    return train, validation


def _batches(
    rows: Iterable[tuple[Document, bool, int]],
) -> Iterator[list[tuple[Document, bool, int]]]:
    batch: list[tuple[Document, bool, int]] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row[0].text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Writes one split and counts what goes into it."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        # Here, for it takes seconds and nothing else needs it: megatron.core imports all of torch.
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._prefix = prefix
        self._dtype = DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._dtype)
        self._counts = np.zeros(vocab_size, np.int64)
        self._documents = 0
        self._bytes = 0

    def add(self, ids: list[int], num_bytes: int) -> None:
        """Append a document, its end-of-text token included."""
        tokens = np.array(ids, dtype=self._dtype)
        self._builder.add_document(tokens, [len(ids)])
        np.add.at(self._counts, tokens, 1)  # bincount would cost the vocabulary per document
        self._documents += 1
        self._bytes += num_bytes

    def finish(self) -> SplitSummary:
        """Close the files and sum up."""
        self._builder.finalize(f"{self._prefix}.idx")
        tokens = int(self._counts.sum())
        return SplitSummary(self._documents, tokens, self._bytes, unigram_entropy(self._counts))


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"out {out} is a file; pass --out with a folder")
    if out.is_mount():
        raise UserError(
            f"out {out} is a mount point, which cannot be replaced as a whole; pass --out with a "
            "folder inside it"
        )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Let one process at a time write ``out``; the lock ends with the process."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not Path(lock.lock_file).exists():
            raise UserError(
                f"out {out}: no file can be made in {out.parent}; pass --out with another folder"
            ) from None
        logger.info("another process is preparing %s; waiting for it", out)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _find_existing(out: Path, inputs: DataInputs) -> DataManifest | None:
    """The whole folder with the same inputs, or None if there is none to keep."""
    try:
        manifest = load_manifest(out)
    except UnsupportedFormatError:
        raise
    except (FileNotFoundError, ValueError):
        return None
    if manifest.fingerprint not in (inputs.fingerprint, _enlarged(inputs).fingerprint):
        differences = "; ".join(manifest.inputs.differences(inputs))
        raise UserError(
            f"out {out} holds data made from other inputs: {differences}; pass another --out, or "
            f"remove {out} first"
        )
    logger.info("%s is already prepared from the same inputs; nothing to do", out)
    return manifest


def _building_prefix(out: Path) -> str:
    return f".{out.name}.building-"


def _remove_half_written(out: Path) -> None:
    """Remove what earlier attempts left; holding the lock, none of them is still at work.

    Raises:
        ValueError: If ``out`` holds anything which was not written here.
    """
    for path in out.parent.iterdir():
        if path.name.startswith(_building_prefix(out)):
            shutil.rmtree(path, ignore_errors=True)
    if not out.exists():
        return
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if name not in _OWN_NAMES]
    if foreign:
        raise UserError(
            f"out {out} is not a prepared data folder and holds other files "
            f"({', '.join(foreign[:3])}); pass --out with a new or empty folder"
        )
    if names:
        logger.warning("%s is half-written or damaged; preparing it again", out)
    shutil.rmtree(out)


def _publish(building: Path, out: Path, inputs: DataInputs) -> DataManifest:
    try:
        os.rename(building, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Some network filesystems do not carry the lock to other machines: one was faster.
        faster = _find_existing(out, inputs)
        if faster is None:
            raise
        return faster
    manifest = load_manifest(out)
    _report(manifest)
    return manifest


def _report(manifest: DataManifest) -> None:
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        logger.info(
            "%s: %d documents, %d tokens, %.2f bytes per token, unigram entropy %.3f nats",
            name,
            split.documents,
            split.tokens,
            split.bytes / split.tokens,
            split.unigram_entropy,
        )
    logger.info("prepared %s", manifest.path)


@contextlib.contextmanager
def _progress(description: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes on a terminal; elsewhere one log line at the start and the end."""
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
