"""Looks at the corpora of a mixture: each is opened once, counted and compared with the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

from trinity_megatron.data.address import StoredAt, is_address
from trinity_megatron.data.corpus import ReadOptions, hash_file
from trinity_megatron.data.index_file import IndexHead, read_head
from trinity_megatron.data.manifest import (
    MANIFEST_NAME,
    DataManifest,
    check_files,
    check_tokenizer,
    read_manifest,
)
from trinity_megatron.data.mixture.corpora import (
    IndexedCorpus,
    MixtureData,
    MixtureOutline,
    RawCorpus,
    RawText,
)
from trinity_megatron.data.mixture.definition import (
    TEXT_ORDERS,
    Corpus,
    Mixture,
    Phase,
    is_mixture,
)
from trinity_megatron.data.mixture.mixture_file import load_mixture
from trinity_megatron.data.output_folder import DATA_FILES
from trinity_megatron.data.text.text_corpus import TextCorpus, find_text
from trinity_megatron.data.text.token_parts import TokenCorpus
from trinity_megatron.errors import MissingInputError, UserError

# The corpus of raw text that --data names itself.
_TEXT = "text"
# Corpora looked at a time: most of it is waiting for the file system.
_THREADS = 16


def read_mixture(path: str | Path | None) -> MixtureData | None:
    """The mixture that ``--data`` names; None for a prepared folder and without.

    Raw text is a mixture of one corpus, called ``text``.

    Raises:
        UserError: The file or a corpus cannot be read.
    """
    mixture = _load(path)
    return None if mixture is None else open_mixture(mixture)


def read_outline(path: str | Path | None) -> MixtureOutline | None:
    """As :func:`read_mixture`, for ranks that get the corpora from the first one.

    No file of a corpus is opened but the manifest of the first prepared folder.

    Raises:
        UserError: The file or that manifest cannot be read.
    """
    mixture = _load(path)
    if mixture is None:
        return None
    paths = [corpus.path for corpus in mixture.corpora.values()]
    folders = (place for place in paths if isinstance(place, Path))
    first = next((place for place in folders if (place / MANIFEST_NAME).is_file()), None)
    manifest = None if first is None else read_manifest(first)
    return MixtureOutline(mixture, _find_tokenizer(mixture, manifest), manifest)


def _load(path: str | Path | None) -> Mixture | None:
    if path is None:
        return None
    if is_mixture(path):
        return load_mixture(path)
    if not _is_text(path):
        return None
    place = StoredAt(str(path).rstrip("/")) if is_address(path) else Path(path)
    corpora = {_TEXT: Corpus(_TEXT, place)}
    return Mixture(place, corpora, (Phase(None, {_TEXT: Fraction(1)}),), "rsdb")


def _is_text(path: str | Path) -> bool:
    """Whether ``--data`` names raw text, and no folder of ``prepare-data``, also a broken one."""
    if is_address(path) or Path(path).is_file():
        return True
    if not Path(path).is_dir():
        return False
    names = {entry.name for entry in Path(path).iterdir() if not entry.name.startswith(".")}
    return bool(names) and not names & {MANIFEST_NAME, *DATA_FILES}


def open_mixture(mixture: Mixture) -> MixtureData:
    """Look at the corpora of a mixture.

    Args:
        mixture: Its file.

    Raises:
        UserError: A corpus is missing, damaged, empty, or of another tokenizer than the others;
            names the file, the key and the remedy.
    """
    _refuse_same_paths(mixture)
    corpora: dict[str, IndexedCorpus | RawCorpus] = {}
    first: DataManifest | None = None
    with ThreadPoolExecutor(_THREADS) as pool:
        for corpus, manifest in pool.map(partial(_open_corpus, mixture), mixture.corpora.values()):
            corpora[corpus.corpus.name] = corpus
            first = first or manifest  # a manifest lists all sources, so the others are dropped
    raw = [name for name, item in corpora.items() if isinstance(item, RawCorpus)]
    if raw:
        _check_raw(mixture, raw)
    indexed = [item for item in corpora.values() if isinstance(item, IndexedCorpus)]
    _check_tokenizers(mixture, indexed)
    if first is not None:
        check_tokenizer(first)  # the others are copies that nothing reads
    tokenizer = _find_tokenizer(mixture, first)
    if tokenizer is None and not raw:  # of raw text --tokenizer-model may name it
        raise UserError(
            f"--data {mixture.file}: no corpus is a folder of prepare-data, so nothing says which "
            "tokenizer made them. Remedy: tokenizer: FOLDER, of a Hugging Face tokenizer."
        )
    return MixtureData(mixture, tokenizer, first, corpora)


def _find_tokenizer(mixture: Mixture, manifest: DataManifest | None) -> Path | None:
    """The folder of the tokenizer that the file or a prepared folder names; None without."""
    tokenizer = mixture.tokenizer
    if tokenizer is None and manifest is not None:
        tokenizer = manifest.tokenizer_path
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise MissingInputError(
            f"--data {mixture.file}: tokenizer {tokenizer} holds no tokenizer.json. Remedy: the "
            "folder of a Hugging Face tokenizer"
        )
    return tokenizer


def _refuse_same_paths(mixture: Mixture) -> None:
    paths: dict[str, str] = {}
    for corpus in mixture.corpora.values():
        path = corpus.path if isinstance(corpus.path, StoredAt) else corpus.path.resolve()
        other = paths.setdefault(str(path), corpus.name)
        if other != corpus.name:
            raise UserError(
                f"--data {mixture.file}: corpora.{corpus.name}.path is that of {other}. Remedy: "
                "one corpus for it, with the sum of the weights."
            )


def _check_raw(mixture: Mixture, raw: list[str]) -> None:
    """Refuse what a mixture of raw text cannot be."""
    key = f"--data {mixture.file}"
    if mixture.order not in TEXT_ORDERS:
        raise UserError(
            f"{key}: order is {mixture.order}, which raw text cannot be read in: it has no index. "
            f"Remedy: order: {' or order: '.join(TEXT_ORDERS)}."
        )
    for corpus in (mixture.corpora[name] for name in raw):
        if corpus.length_bias is not None:
            raise UserError(
                f"{key}: corpora.{corpus.name}.length_bias is given, and the lengths of raw text "
                "are not known beforehand. Remedy: drop it, or prepare-data."
            )
        if corpus.max_epochs is not None:
            raise UserError(
                f"{key}: corpora.{corpus.name}.max_epochs is {corpus.max_epochs}, and the tokens "
                "of raw text are not known beforehand. Remedy: drop it, or prepare-data."
            )


def _open_corpus(
    mixture: Mixture, corpus: Corpus
) -> tuple[IndexedCorpus | RawCorpus, DataManifest | None]:
    """A corpus, and the manifest of a prepared folder."""
    key, path = f"--data {mixture.file}: corpora.{corpus.name}", corpus.path
    validation, head = _find_validation(corpus.validation, f"{key}.validation")
    if isinstance(path, StoredAt) or not (path / MANIFEST_NAME).is_file() and path.exists():
        _refuse_index(path, key)
        return RawCorpus(corpus, validation, head), None
    is_read = isinstance(validation, RawText)
    if not is_read and (corpus.options != ReadOptions() or corpus.skips_bad_rows):
        raise UserError(
            f"{key}.path {path} is no raw text, and text_key, split_on or skip_bad_rows is "
            "given. Remedy: drop these, or the path of the text."
        )
    manifest, train, heads = None, path, dict[Path, IndexHead]()
    if path.exists():
        manifest = read_manifest(path)
        heads = {(path / name).with_suffix(""): of for name, of in check_files(manifest).items()}
        if manifest.inputs.chat is not None:
            raise UserError(
                f"{key}.path {path} holds conversations, which a mixture would read as "
                "text. Remedy: --data with that folder, in a run of its own."
            )
        train = manifest.train_prefix
        if corpus.validation is None:
            place = manifest.validation_prefix
            validation, head = _find_validation(place, f"{key}.validation", heads)
    train_head = heads.get(train) or read_dataset_head(train, f"{key}.path")
    if not train_head.tokens:
        raise UserError(f"{key}.path {train} has no tokens. Remedy: drop the corpus.")
    fingerprint = None if manifest is None else manifest.tokenizer_fingerprint
    return IndexedCorpus(corpus, train, validation, train_head, head, fingerprint), manifest


def _refuse_index(path: Path | StoredAt, key: str) -> None:
    """Refuse a folder of token ids where raw text is meant."""
    if isinstance(path, Path) and path.is_dir() and any(path.glob("*.idx")):
        prefix = next(path.glob("*.idx")).with_suffix("")
        raise UserError(
            f"{key}.path {path} holds an index of token ids and is no folder of prepare-data. "
            f"Remedy: the path of a .bin and .idx without that ending, such as {prefix}."
        )


def _find_validation(
    place: Path | StoredAt | None, key: str, known: Mapping[Path, IndexHead] | None = None
) -> tuple[Path | RawText | None, IndexHead | None]:
    """The validation data of a corpus and their head; None without, and where they are empty.

    Args:
        place: Of the data.
        key: That names them in errors.
        known: Heads that were read, by their prefixes.
    """
    if place is None:
        return None, None
    if isinstance(place, StoredAt):
        return RawText(place, key), None
    head = (known or {}).get(place)
    if head is None and (place / MANIFEST_NAME).is_file():
        raise UserError(
            f"{key} {place} is a folder of prepare-data. Remedy: {place / 'validation'}, the "
            f"prefix of its validation data, or {place / 'train'}."
        )
    if head is None and place.exists() and not Path(f"{place}.idx").exists():
        return RawText(place, key), None
    head = head or read_dataset_head(place, key)
    return (place, head) if head.tokens else (None, None)


def find_texts(data: MixtureData) -> list[TextCorpus | TokenCorpus]:
    """What the streams of a mixture with raw text read: the files of each corpus, in its order.

    Raises:
        UserError: One cannot be read; names the file and the remedy.
    """
    found: list[TextCorpus | TokenCorpus] = []
    for name, item in data.corpora.items():
        key = f"--data {data.mixture.file}: corpora.{name}"
        if isinstance(item, IndexedCorpus):
            size = Path(f"{item.train}.bin").stat().st_size
            found.append(TokenCorpus(name, key, item.train, item.documents, size))
            continue
        text = find_text(
            item.corpus.path,
            name=name,
            key=key,
            options=item.corpus.options,
            skips_bad_rows=item.corpus.skips_bad_rows,
        )
        found.append(text)
    return found


def read_dataset_head(prefix: Path, key: str) -> IndexHead:
    """Documents and tokens of a dataset.

    Args:
        prefix: Of its files ``.idx`` and ``.bin``.
        key: That names it, for errors.

    Raises:
        UserError: A file is missing, or the index is damaged.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        return read_head(index, tokens)
    except ValueError as error:
        raise UserError(
            f"{key}: {index} is no whole index of token ids ({error}). Remedy: prepare the data "
            "again."
        ) from error
    except OSError as error:
        raise MissingInputError(
            f"{key}: {error.filename} cannot be read ({error.strerror}). Remedy: a folder of "
            "prepare-data, or the path of a .bin and .idx without that ending"
        ) from error


def _check_tokenizers(mixture: Mixture, corpora: Sequence[IndexedCorpus]) -> None:
    """All prepared folders were made with one tokenizer."""
    known: dict[str, str] = {}
    if mixture.tokenizer is not None and (mixture.tokenizer / "tokenizer.json").is_file():
        known[hash_file(mixture.tokenizer / "tokenizer.json")] = f"tokenizer {mixture.tokenizer}"
    for item in corpora:
        fingerprint = item.tokenizer_fingerprint
        if fingerprint is None:
            continue
        known.setdefault(fingerprint, f"corpora.{item.corpus.name}")
        if len(known) > 1:
            first, other = known.items()
            raise UserError(
                f"--data {mixture.file}: corpora.{item.corpus.name} was made with another "
                f"tokenizer ({other[0][:12]}) than {first[1]} ({first[0][:12]}). Remedy: "
                "trinity-megatron prepare-data --tokenizer with the same one for all."
            )
