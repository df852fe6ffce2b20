"""What all streams of a run share that reads raw text, and the encoder of its documents."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from trinity_megatron.data.given_tokenizer import load_tokenizer
from trinity_megatron.data.text.parts import Document, Parts
from trinity_megatron.data.text.text_corpus import TextCorpus
from trinity_megatron.data.text.token_parts import TokenCorpus, TokenParts
from trinity_megatron.data.tokenizer import get_eod_id


class Schedule(Protocol):
    """Says which corpus a sample is of."""

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpora of samples, and their numbers among all of the run's from the corpus."""


class TextEncoder:
    """Encodes documents as ``prepare-data`` does.

    Args:
        folder: Of the tokenizer.

    Raises:
        UserError: The tokenizer cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        # Each worker has a core; threads of its own would only be in the way of the others.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        given = load_tokenizer(folder)
        self._tokenizer, self._eod_id = (
            given.tokenizer,
            get_eod_id(given.tokenizer, given.eos_token),
        )
        self._tokenizer.encode_special_tokens = True

    def encode(self, document: Document) -> np.ndarray:
        """Tokens of a text and the end-of-text token, int32 ``[n]``; tokens are as they are."""
        if not isinstance(document, str):
            return document
        [encoding] = self._tokenizer.encode_batch_fast([document], add_special_tokens=False)
        return np.array([*encoding.ids, self._eod_id], dtype=np.int32)


def make_parts(corpus: TextCorpus | TokenCorpus, num_streams: int) -> Parts | TokenParts:
    """The parts of a corpus that streams take in turn."""
    if isinstance(corpus, TokenCorpus):
        return TokenParts(corpus, num_streams)
    return Parts(corpus, num_streams)


@dataclass(frozen=True)
class TextMixture:
    """What all streams of a run share.

    Attributes:
        corpora: Of the mixture, in its order.
        starts: First sample of each phase.
        parts: Weights in each phase, by number of the corpus: whole numbers.
        order: ``rsdb`` or ``sequential``.
        documents: Of a stream's buffer, see ``DocumentBuffer``.
        num_streams: Number of streams.
        seed: Of the run.
        seq_length: Tokens of a sample.
        tokenizer: Its folder.
        schedule: Of the order ``sequential``.
    """

    corpora: Sequence[TextCorpus | TokenCorpus]
    starts: Sequence[int]
    parts: Sequence[Mapping[int, int]]
    order: str
    documents: int
    num_streams: int
    seed: int
    seq_length: int
    tokenizer: Path
    schedule: Schedule | None = None

    @property
    def names(self) -> list[str]:
        """Of the corpora."""
        return [corpus.name for corpus in self.corpora]

    @cached_property
    def all_parts(self) -> list[Parts | TokenParts]:
        """The parts of each corpus."""
        return [make_parts(corpus, self.num_streams) for corpus in self.corpora]

    def phase_of(self, sample: int) -> int:
        """The phase that a sample of the run is in."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1
