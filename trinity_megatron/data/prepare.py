"""Preparing a corpus for Megatron: tokenizer, indexed training and validation data, manifest."""

import shutil
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from trinity_megatron.data.corpus import (
    ReadOptions,
    SourceFile,
    find_files,
    hash_file,
    is_unchanged,
)
from trinity_megatron.data.encode import SplitEncoder, encode_splits, write_splits
from trinity_megatron.data.given_tokenizer import GivenTokenizer, copy_tokenizer, load_tokenizer
from trinity_megatron.data.inputs import READER_VERSION, DataInputs
from trinity_megatron.data.left_out import check_formats
from trinity_megatron.data.manifest import DataManifest, save_manifest, sync_file
from trinity_megatron.data.output_folder import (
    DATA_FILES,
    building_prefix,
    check_out,
    enlarged_inputs,
    find_existing,
    locked,
    publish,
    remove_half_written,
)
from trinity_megatron.data.pre_tokenizer import PRE_TOKENIZER_VERSION
from trinity_megatron.data.scan import Corpus, scan
from trinity_megatron.data.split import MIN_SPLIT_TOKENS
from trinity_megatron.data.tokenizer import (
    CHATML_VERSION,
    END_OF_TEXT,
    check_vocab_size,
    get_eod_id,
    save_tokenizer,
)
from trinity_megatron.errors import UserError

_DEFAULTS = ReadOptions()


def prepare_data(
    out: Path,
    sources: Sequence[Path] = (),
    *,
    vocab_size: int = 4096,
    validation_fraction: float = 0.05,
    tokenizer: Path | None = None,
    options: ReadOptions = _DEFAULTS,
    max_left_out: float = 0.1,
    workers: int | None = None,
) -> DataManifest:
    """Write a corpus as Megatron's indexed data, with a trained or given tokenizer.

    ``out`` is created atomically. A complete folder prepared from the same inputs is kept; an
    incomplete one is replaced.

    Args:
        out: The folder to write: ``train`` and ``validation`` (``.bin``, ``.idx``),
            ``tokenizer/`` and ``manifest.json``.
        sources: Text and source code; JSON, CSV, parquet and Arrow files with a text field;
            compressed files and folders of these. Defaults to Python's standard library.
        vocab_size: Number of tokens of the tokenizer to train; not used with a given tokenizer.
        validation_fraction: Share of the distinct documents that goes to validation. The share is
            larger if it gives less than one document or ``MIN_SPLIT_TOKENS`` tokens, or less than
            both ``WANTED_VALIDATION_TOKENS`` tokens and a tenth of the text.
        tokenizer: Folder of a Hugging Face tokenizer to use unchanged, such as that of a released
            model. Its ``eos_token`` ends every document. If None, a tokenizer is trained.
        options: Options for reading documents from files.
        max_left_out: Largest share, by bytes, of the files that may be text but cannot be read.
        workers: Processes that encode, each with one thread; 1 for this one.  If None, this one
            with a thread for each core.  The data do not depend on it.

    Raises:
        UserError: An argument or a source cannot be used, too much is left out, the corpus is too
            small to split or to fill the vocabulary, or ``out`` contains other data.
        UnsupportedFormatError: ``out`` was written in another format.
    """
    if tokenizer is None:
        check_vocab_size(vocab_size)
    check_settings(validation_fraction, max_left_out)
    out = Path(out).resolve()
    check_out(out)
    given = None if tokenizer is None else load_given(tokenizer, out)
    files, skipped = find_files(sources, exclude=out, options=options)
    check_formats(skipped, files, max_left_out)
    hashes = sorted((file.name, hash_file(file.path)) for file in files)
    inputs = make_inputs(files, hashes, options, vocab_size, validation_fraction, given)
    existing = find_existing(out, inputs)
    if existing is not None:
        return existing
    with locked(out):
        # Another process may have prepared the same data while this one waited for the lock.
        existing = find_existing(out, inputs)
        if existing is not None:
            return existing
        remove_half_written(out)
        corpus = scan(files, skipped, options, max_left_out)
        encode = partial(encode_splits, workers=workers)
        return build_folder(
            out,
            inputs,
            corpus.files,
            lambda folder: write_folder(folder, inputs, corpus, given, encode),
        )


def check_settings(validation_fraction: float, max_left_out: float) -> None:
    """Refuse shares that are none.

    Raises:
        UserError: Names the setting and a usual value.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(
            f"validation_fraction {validation_fraction} is not between 0 and 1; 0.05 is usual"
        )
    if not 0 <= max_left_out <= 1:
        raise UserError(f"max_left_out {max_left_out} is not between 0 and 1; 0.1 is usual")


def make_inputs(
    files: Sequence[SourceFile],
    hashes: Sequence[tuple[str, str]],
    options: ReadOptions,
    vocab_size: int,
    validation_fraction: float,
    given: GivenTokenizer | None,
) -> DataInputs:
    """What the data are made of.

    Args:
        files: The source files.
        hashes: Name and SHA-256 of each, sorted.
        options: How documents are found.
        vocab_size: Of a tokenizer to train.
        validation_fraction: Share of the documents for validation.
        given: A given tokenizer.
    """
    return DataInputs(
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
        special_tokens=CHATML_VERSION if given is None else None,
    )


def load_given(folder: Path, out: Path) -> GivenTokenizer:
    """Load a given tokenizer, which must not lie in the folder that is written.

    Raises:
        UserError: It does, or it cannot be used.
    """
    folder = Path(folder).resolve()
    if folder.is_relative_to(out):
        raise UserError(
            f"tokenizer {folder} lies inside out {out}, which is written anew; pass --tokenizer "
            "with the folder it came from or a copy elsewhere, or pass another --out"
        )
    return load_tokenizer(folder)


def build_folder(
    out: Path,
    inputs: DataInputs,
    files: Sequence[SourceFile],
    write: Callable[[Path], DataManifest],
) -> DataManifest:
    """Write a data folder beside its place, and rename it when it is complete.

    Args:
        out: Its final path, locked by the caller.
        inputs: What it is prepared from.
        files: The source files, which may not change meanwhile.
        write: Writes everything but the manifest, and makes that.

    Raises:
        UserError: A source changed while it was read.
    """
    building = out.with_name(f"{building_prefix(out)}{uuid.uuid4().hex}")
    building.mkdir()
    try:
        manifest = write(building)
        for file in files:
            if not is_unchanged(file):
                raise UserError(f"source {file.path} changed while it was read; run again")
        save_manifest(manifest)
        return publish(building, out, inputs)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def sync_files(folder: Path) -> dict[str, int]:
    """Wait until all files of a data folder are on disk.

    Returns:
        Their sizes in bytes, by relative name, for the manifest.
    """
    tokenizer_files = sorted(path.name for path in (folder / "tokenizer").iterdir())
    names = [*DATA_FILES, *(f"tokenizer/{name}" for name in tokenizer_files)]
    for name in names:
        sync_file(folder / name)
    return {name: (folder / name).stat().st_size for name in names}


def write_folder(
    folder: Path,
    inputs: DataInputs,
    corpus: Corpus,
    given: GivenTokenizer | None,
    encode: SplitEncoder,
) -> DataManifest:
    """Write the splits and the tokenizer into a folder and make their manifest.

    Args:
        folder: That exists.
        inputs: What the data are made of.
        corpus: The documents.
        given: The tokenizer; None to train one.
        encode: Encodes the documents.

    Raises:
        UserError: The corpus is too small.
    """
    written = write_splits(folder, inputs, corpus, given, encode)
    if written.train.tokens < MIN_SPLIT_TOKENS:
        raise UserError(
            f"sources leave {written.train.tokens} tokens for training, fewer than "
            f"{MIN_SPLIT_TOKENS}; add documents, or cut the text into several"
        )
    if given is None:
        save_tokenizer(written.tokenizer, folder / "tokenizer")
    else:
        copy_tokenizer(given, folder / "tokenizer")
    return DataManifest(
        path=folder,
        inputs=enlarged_inputs(inputs) if written.is_enlarged else inputs,
        eod_id=get_eod_id(written.tokenizer, inputs.eos_token or END_OF_TEXT),
        tokenizer_fingerprint=hash_file(folder / "tokenizer" / "tokenizer.json"),
        train=written.train,
        validation=written.validation,
        skipped=corpus.left_out.entries(),
        files=sync_files(folder),
    )
