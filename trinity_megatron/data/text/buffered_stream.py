"""The random sequential document buffer over raw text.

Source: Trinity Large technical report, 3.2.  The buffer holds texts; a document is tokenised when
it is chosen for the first time, unless its corpus is prepared.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trinity_megatron.data.rsdb.document_buffer import UNKNOWN, DocumentBuffer
from trinity_megatron.data.rsdb.feed import DocumentFeed, Documents
from trinity_megatron.data.text.corpus_reader import CorpusReader
from trinity_megatron.data.text.parts import Document
from trinity_megatron.data.text.text_mixture import TextEncoder, TextMixture
from trinity_megatron.data.text.text_stream import (
    SequentialTextStream,
    State,
    TextPiece,
    TextStream,
)

# No more documents enter a buffer that holds so many bytes of text (in UTF-8).
MAX_TEXT_BYTES = 32 * 2**20
# Tokens of a document that is not tokenised yet; they are corrected when it is.
_BYTES_PER_TOKEN = 4


@dataclass
class _Held:
    """A document in the buffer.

    Attributes:
        text: In UTF-8; empty once it is tokenised.
        num_bytes: Of the text.
        checksum: Of the text.
        tokens: int32 ``[n]``; None before it is chosen.
    """

    text: bytes
    num_bytes: int
    checksum: int
    tokens: np.ndarray | None = None

    @classmethod
    def of(cls, document: Document) -> _Held:
        if isinstance(document, str):
            content = document.encode("utf-8")
            return cls(content, len(content), zlib.crc32(content))
        return cls(b"", document.nbytes, zlib.crc32(document), document)

    @property
    def estimate(self) -> int:
        """Tokens, which are counted only once the text is tokenised."""
        return self.num_bytes // _BYTES_PER_TOKEN + (1 if self.tokens is None else 0)


class _TextOrder:
    """The documents of a corpus, which the buffer holds from then on."""

    def __init__(self, corpus: int, reader: CorpusReader, stream: BufferedTextStream) -> None:
        self.name = reader.parts.corpus.name
        self._corpus, self._reader, self._stream = corpus, reader, stream

    def get(self, number: int) -> tuple[int, int]:
        document, content = self._reader.next()
        held = _Held.of(content)
        self._stream.hold(self._corpus, document, held)
        return document, held.estimate


class BufferedTextStream(TextStream):
    """Fills sequences from a buffer of documents.

    Args:
        mixture: What all streams share.
        number: Of the stream.
        encoder: Of the documents.
    """

    def __init__(self, mixture: TextMixture, number: int, encoder: TextEncoder) -> None:
        super().__init__(mixture, number, encoder)
        self.buffer = DocumentBuffer(
            mixture.documents, seed=mixture.seed, stream=number, measure=self._measure
        )
        orders = [_TextOrder(corpus, reader, self) for corpus, reader in enumerate(self.readers)]
        self.feed = DocumentFeed(orders, mixture.parts)
        num_corpora = len(orders)
        # Of each corpus: the first document of the present phase, and a checksum of what is held.
        self._first_of_phase = np.zeros(num_corpora, dtype=np.int64)
        self._checksums = np.zeros(num_corpora, dtype=np.int64)
        self._held: dict[tuple[int, int], _Held] = {}
        self._num_bytes = 0

    def hold(self, corpus: int, document: int, held: _Held) -> None:
        """Keep a document until it is read to its end."""
        self._held[corpus, document] = held
        self._num_bytes += held.num_bytes
        self._checksums[corpus] ^= held.checksum

    def _fill(self) -> list[TextPiece]:
        made = []
        for piece in self.buffer.fill(self.mixture.seq_length, self._take):
            key = piece.corpus, piece.document
            held = self._held[key]
            assert held.tokens is not None
            # One token more, where there is one: the label of the last.
            tokens = held.tokens[piece.start : piece.start + piece.length + 1]
            made.append(TextPiece(piece.document, tokens, piece.length))
            if not piece.rest:
                del self._held[key]
                self._num_bytes -= held.num_bytes
                self._checksums[piece.corpus] ^= held.checksum
        return made

    def _take(self, count: int) -> Documents:
        """The next document, if there is room for it."""
        phase = self.mixture.phase_of(self.sample)
        if phase != self.feed.phase:
            self._first_of_phase[:] = [reader.position for reader in self.readers]
        is_full = self._num_bytes >= MAX_TEXT_BYTES and self.buffer.num_active > 0
        taken = self.feed.take(0 if is_full else 1, phase)
        return Documents(taken.corpora, taken.documents, np.full_like(taken.lengths, UNKNOWN))

    def _measure(self, place: int) -> int:
        """Tokenise a document, and correct what the feed knows of it."""
        corpus, document = int(self.buffer.corpora[place]), int(self.buffer.numbers[place])
        held = self._held[corpus, document]
        estimate = held.estimate
        if held.tokens is None:
            held.tokens = self.encoder.encode(held.text.decode("utf-8"))
            held.text = b""
        head = self.buffer.heads[place]
        if head >= len(held.tokens):
            raise self.readers[corpus].changed()
        # One that has a head was counted before the checkpoint.
        if not head and document >= self._first_of_phase[corpus]:
            self.feed.fed[corpus] += len(held.tokens) - estimate
        return len(held.tokens)

    def state(self) -> State:
        """What a resume needs: 20 bytes for each document in the buffer."""
        return {
            **super().state(),
            **self.buffer.state(),
            "phase": self.feed.phase,
            "fed": self.feed.fed.copy(),
            "first_of_phase": self._first_of_phase.copy(),
            "checksums": self._checksums.copy(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """See :meth:`TextStream.load`."""
        super().load(state)
        number_of = self._numbers(state)
        used = number_of >= 0
        self.feed.phase = int(state["phase"])
        self.feed.fed[number_of[used]] = state["fed"][used]
        self._first_of_phase[number_of[used]] = state["first_of_phase"][used]
        corpora = number_of[state["corpora"]]
        for corpus in np.unique(corpora).tolist():
            documents = state["numbers"][corpora == corpus].tolist()
            for document, content in self.readers[corpus].fetch(documents).items():
                self.hold(corpus, document, _Held.of(content))
        for number, checksum in zip(number_of, state["checksums"], strict=True):
            if number >= 0 and self._checksums[number] != checksum:
                raise self.readers[number].changed()
        lengths = np.full(len(corpora), UNKNOWN, dtype=np.int64)
        self.buffer.load({**state, "corpora": corpora}, lengths)


def make_stream(mixture: TextMixture, number: int, encoder: TextEncoder) -> TextStream:
    """The stream of a mixture's order."""
    kind = BufferedTextStream if mixture.order == "rsdb" else SequentialTextStream
    return kind(mixture, number, encoder)
