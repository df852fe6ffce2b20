"""The corpora of a mixture as they lie on the disk: opened, counted and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from trinity_megatron.data.address import StoredAt, is_address
from trinity_megatron.data.corpus import ReadOptions, hash_file
from trinity_megatron.data.index_file import HEADER, read_index_size
from trinity_megatron.data.manifest import MANIFEST_NAME, DataManifest, load_manifest
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


@dataclass(frozen=True)
class RawText:
    """Raw text that is validation data; a run tokenises it once.

    Attributes:
        place: A file, a folder or an address.
        key: That names it in errors.
    """

    place: Path | StoredAt
    key: str


@dataclass(frozen=True)
class IndexedCorpus:
    """A corpus in Megatron's format.

    Attributes:
        corpus: What the file of the mixture says of it.
        train: Prefix of its ``.bin`` and ``.idx``.
        validation: Its validation data, if any: a prefix, or raw text.
        documents: Number of its documents.
        tokens: Number of its tokens.
        manifest: Of the folder that ``prepare-data`` made; None for a bare prefix.
    """

    corpus: Corpus
    train: Path
    validation: Path | RawText | None
    documents: int
    tokens: int
    manifest: DataManifest | None

    @cached_property  # it reads the length of every document, and most callers do not ask for it
    def epoch_tokens(self) -> int:
        """Tokens that an epoch reads; fewer with a ``length_bias``, on average."""
        if self.corpus.length_bias is None:
            return self.tokens
        return self.corpus.length_bias.expected_tokens(read_lengths(self.train, self.documents))


@dataclass(frozen=True)
class RawCorpus:
    """A corpus of raw text, whose files are not looked at yet.

    Attributes:
        corpus: What the file of the mixture says of it.
        validation: Its validation data, if any: a prefix, or raw text.
    """

    corpus: Corpus
    validation: Path | RawText | None


@dataclass(frozen=True)
class MixtureData:
    """A mixture and its corpora.

    Attributes:
        mixture: The file.
        corpora: By name, in the order of the file.
        tokenizer: Folder of the tokenizer that made all of them, or that encodes them; None where
            ``--tokenizer-model`` must name it.
        manifest: Of a prepared folder among them, which knows that tokenizer; None without one.
    """

    mixture: Mixture
    corpora: Mapping[str, IndexedCorpus | RawCorpus]
    tokenizer: Path | None
    manifest: DataManifest | None

    @property
    def indexed(self) -> dict[str, IndexedCorpus]:
        """The corpora in Megatron's format."""
        return {n: item for n, item in self.corpora.items() if isinstance(item, IndexedCorpus)}

    @property
    def raw(self) -> dict[str, RawCorpus]:
        """The corpora of raw text."""
        return {n: item for n, item in self.corpora.items() if isinstance(item, RawCorpus)}

    @property
    def train_prefixes(self) -> list[str] | None:
        """What Megatron's datasets read, in the order of the corpora; None where streams read."""
        return None if self.raw else [str(item.train) for item in self.indexed.values()]

    @property
    def validation_prefixes(self) -> list[str] | None:
        """The validation data in Megatron's format; None without."""
        prefixes = [item.validation for item in self.validated.values()]
        return [str(prefix) for prefix in prefixes if isinstance(prefix, Path)] or None

    @property
    def has_streams(self) -> bool:
        """Whether virtual streams read the training data, with a loader of their own."""
        return bool(self.raw) or self.mixture.order == "rsdb"

    @property
    def validated(self) -> dict[str, IndexedCorpus | RawCorpus]:
        """The corpora that have validation data."""
        return {name: item for name, item in self.corpora.items() if item.validation is not None}


def read_mixture(path: str | Path | None) -> MixtureData | None:
    """The mixture that ``--data`` names; None for a prepared folder and without.

    Raw text is a mixture of one corpus, called ``text``.

    Raises:
        UserError: The file or a corpus cannot be read.
    """
    if path is None:
        return None
    if is_mixture(path):
        return open_mixture(load_mixture(path))
    if not _is_text(path):
        return None
    place = StoredAt(str(path).rstrip("/")) if is_address(path) else Path(path)
    corpora = {_TEXT: Corpus(_TEXT, place)}
    return open_mixture(Mixture(place, corpora, (Phase(None, {_TEXT: Fraction(1)}),), "rsdb"))


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
    corpora = {name: _open_corpus(mixture, corpus) for name, corpus in mixture.corpora.items()}
    raw = [name for name, item in corpora.items() if isinstance(item, RawCorpus)]
    if raw:
        _check_raw(mixture, raw)
    indexed = [item for item in corpora.values() if isinstance(item, IndexedCorpus)]
    prepared = [item for item in indexed if item.manifest is not None]
    manifest = prepared[0].manifest if prepared else None
    _check_tokenizers(mixture, prepared)
    tokenizer = mixture.tokenizer
    if tokenizer is None and manifest is not None:
        tokenizer = manifest.tokenizer_path
    if tokenizer is None and raw:  # --tokenizer-model may name it
        return MixtureData(mixture, corpora, None, None)
    if tokenizer is None:
        raise UserError(
            f"--data {mixture.file}: no corpus is a folder of prepare-data, so nothing says which "
            "tokenizer made them. Remedy: tokenizer: FOLDER, of a Hugging Face tokenizer."
        )
    if not (tokenizer / "tokenizer.json").is_file():
        raise MissingInputError(
            f"--data {mixture.file}: tokenizer {tokenizer} holds no tokenizer.json. Remedy: the "
            "folder of a Hugging Face tokenizer"
        )
    return MixtureData(mixture, corpora, tokenizer, manifest)


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


def _open_corpus(mixture: Mixture, corpus: Corpus) -> IndexedCorpus | RawCorpus:
    key, path = f"--data {mixture.file}: corpora.{corpus.name}", corpus.path
    validation = _find_validation(corpus.validation, f"{key}.validation")
    if isinstance(path, StoredAt) or not (path / MANIFEST_NAME).is_file() and path.exists():
        _refuse_index(path, key)
        return RawCorpus(corpus, validation)
    is_read = isinstance(validation, RawText)
    if not is_read and (corpus.options != ReadOptions() or corpus.skips_bad_rows):
        raise UserError(
            f"{key}.path {path} is no raw text, and text_key, split_on or skip_bad_rows is "
            "given. Remedy: drop these, or the path of the text."
        )
    manifest, train = None, path
    if path.exists():
        manifest = load_manifest(path)
        if manifest.inputs.chat is not None:
            raise UserError(
                f"{key}.path {path} holds conversations, which a mixture would read as "
                "text. Remedy: --data with that folder, in a run of its own."
            )
        train = manifest.train_prefix
        if corpus.validation is None:
            validation = _find_validation(manifest.validation_prefix, f"{key}.validation")
    documents, tokens = read_size(train, f"{key}.path")
    if not tokens:
        raise UserError(f"{key}.path {train} has no tokens. Remedy: drop the corpus.")
    return IndexedCorpus(corpus, train, validation, documents, tokens, manifest)


def _refuse_index(path: Path | StoredAt, key: str) -> None:
    """Refuse a folder of token ids where raw text is meant."""
    if isinstance(path, Path) and path.is_dir() and any(path.glob("*.idx")):
        prefix = next(path.glob("*.idx")).with_suffix("")
        raise UserError(
            f"{key}.path {path} holds an index of token ids and is no folder of prepare-data. "
            f"Remedy: the path of a .bin and .idx without that ending, such as {prefix}."
        )


def _find_validation(place: Path | StoredAt | None, key: str) -> Path | RawText | None:
    """The validation data of a corpus; None without, and where they are empty."""
    if place is None:
        return None
    if isinstance(place, StoredAt):
        return RawText(place, key)
    if (place / MANIFEST_NAME).is_file():
        raise UserError(
            f"{key} {place} is a folder of prepare-data. Remedy: {place / 'validation'}, the "
            f"prefix of its validation data, or {place / 'train'}."
        )
    if place.exists() and not Path(f"{place}.idx").exists():
        return RawText(place, key)
    return place if read_size(place, key)[1] else None


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


def read_size(prefix: Path, key: str) -> tuple[int, int]:
    """Documents and tokens of a dataset.

    Args:
        prefix: Of its files ``.idx`` and ``.bin``.
        key: That names it, for errors.

    Raises:
        UserError: A file is missing, or the index is damaged.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        return read_index_size(index, tokens)
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


def read_lengths(prefix: Path, documents: int) -> np.ndarray:
    """Tokens of each document of a dataset, int32 ``[documents]``: a map of the index.

    Args:
        prefix: Of its files ``.idx`` and ``.bin``, which are known to be whole.
        documents: Their number, each one sequence.
    """
    return np.memmap(f"{prefix}.idx", np.int32, "r", offset=HEADER.size, shape=(documents,))


def _check_tokenizers(mixture: Mixture, prepared: Sequence[IndexedCorpus]) -> None:
    """All folders were made with one tokenizer."""
    known: dict[str, str] = {}
    if mixture.tokenizer is not None and (mixture.tokenizer / "tokenizer.json").is_file():
        known[hash_file(mixture.tokenizer / "tokenizer.json")] = f"tokenizer {mixture.tokenizer}"
    for item in prepared:
        assert item.manifest is not None
        fingerprint = item.manifest.tokenizer_fingerprint
        known.setdefault(fingerprint, f"corpora.{item.corpus.name}")
        if len(known) > 1:
            first, other = known.items()
            raise UserError(
                f"--data {mixture.file}: corpora.{item.corpus.name} was made with another "
                f"tokenizer ({other[0][:12]}) than {first[1]} ({first[0][:12]}). Remedy: "
                "trinity-megatron prepare-data --tokenizer with the same one for all."
            )
