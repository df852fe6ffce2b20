"""The corpora of a mixture as they lie on the disk: what a run knows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trinity_megatron.data.address import StoredAt
from trinity_megatron.data.index_file import HEADER, IndexHead
from trinity_megatron.data.manifest import DataManifest
from trinity_megatron.data.mixture.definition import Corpus, Mixture


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
        train_head: Of the index of ``train``.
        validation_head: Of the index of ``validation``; None without, and for raw text.
        tokenizer_fingerprint: SHA-256 of the tokenizer, by the manifest of the folder that
            ``prepare-data`` made; None for a bare prefix.
    """

    corpus: Corpus
    train: Path
    validation: Path | RawText | None
    train_head: IndexHead
    validation_head: IndexHead | None
    tokenizer_fingerprint: str | None

    @property
    def documents(self) -> int:
        """Number of its documents."""
        return self.train_head.documents

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return self.train_head.tokens

    @property
    def heads(self) -> dict[str, IndexHead]:
        """What the heads of its indices say, by their prefixes."""
        found = {str(self.train): self.train_head}
        if self.validation_head is not None:
            found[str(self.validation)] = self.validation_head
        return found

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
        validation_head: Of the index of ``validation``; None without, and for raw text.
    """

    corpus: Corpus
    validation: Path | RawText | None
    validation_head: IndexHead | None

    @property
    def heads(self) -> dict[str, IndexHead]:
        """What the head of its validation data says, by their prefix."""
        return {} if self.validation_head is None else {str(self.validation): self.validation_head}


@dataclass(frozen=True)
class MixtureOutline:
    """What a rank knows of a mixture before the first one has told it of the corpora.

    Attributes:
        mixture: The file.
        tokenizer: Folder of the tokenizer that made all corpora, or that encodes them; None where
            ``--tokenizer-model`` must name it.
        manifest: Of the first prepared folder, which knows that tokenizer; None without one, and
            where a rank got the corpora from the first one.
    """

    mixture: Mixture
    tokenizer: Path | None
    manifest: DataManifest | None


@dataclass(frozen=True)
class MixtureData(MixtureOutline):
    """A mixture and its corpora.

    Attributes:
        corpora: By name, in the order of the file.
    """

    corpora: Mapping[str, IndexedCorpus | RawCorpus]

    @property
    def heads(self) -> dict[str, IndexHead]:
        """What the heads of all indices say, by their prefixes."""
        return {
            prefix: head for item in self.corpora.values() for prefix, head in item.heads.items()
        }

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


def read_lengths(prefix: Path, documents: int) -> np.ndarray:
    """Tokens of each document of a dataset, int32 ``[documents]``: a map of the index.

    Args:
        prefix: Of its files ``.idx`` and ``.bin``, which are known to be whole.
        documents: Their number, each one sequence.
    """
    return np.memmap(f"{prefix}.idx", np.int32, "r", offset=HEADER.size, shape=(documents,))
