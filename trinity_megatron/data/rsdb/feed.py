"""The documents that enter the buffer of a virtual stream, in the ratio of the weights."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trinity_megatron.data.rsdb.length_bias import LengthBias
from trinity_megatron.data.rsdb.permutation import permute

_AHEAD = 256  # documents whose places are computed at a time
# The length of a document that an epoch leaves out.
LEFT_OUT = -1


@dataclass(frozen=True)
class Documents:
    """Some documents.

    Attributes:
        corpora: Number of the corpus of each, int32 ``[n]``.
        documents: Its number in the corpus, int64 ``[n]``.
        lengths: Its tokens, int64 ``[n]``.
    """

    corpora: np.ndarray
    documents: np.ndarray
    lengths: np.ndarray


class DocumentOrder(Protocol):
    """The documents of a corpus in the order in which a stream takes them."""

    name: str

    def get(self, number: int) -> tuple[int, int]:
        """Number in the corpus, and tokens or ``LEFT_OUT``, of a document of this stream."""
        ...


class CorpusOrder:
    """The documents of a corpus, epoch after epoch, each in an order of its own.

    Args:
        name: Of the corpus; the order depends on it.
        lengths: Tokens of each document, integers ``[num_documents]``; may be a memory map.
        seed: Of the run.
        stream: Number of the virtual stream.
        num_streams: Their number: they take turns in the documents.
        bias: Which documents an epoch leaves out; None for none.
    """

    def __init__(
        self,
        name: str,
        lengths: np.ndarray,
        *,
        seed: int,
        stream: int,
        num_streams: int,
        bias: LengthBias | None = None,
    ) -> None:
        self.name = name
        self.lengths = lengths
        self._bias = bias
        self._stream, self._num_streams = stream, num_streams
        self._seed = seed
        self._first = 0
        self._ahead: list[tuple[int, int]] = []

    def get(self, number: int) -> tuple[int, int]:
        """Number in the corpus, and tokens or ``LEFT_OUT``, of a document of this stream.

        Args:
            number: Of the document among those of the stream.
        """
        if not self._first <= number < self._first + len(self._ahead):
            self._first = number
            documents, lengths = self._find(np.arange(number, number + _AHEAD, dtype=np.int64))
            self._ahead = list(zip(documents.tolist(), lengths.tolist(), strict=True))
        return self._ahead[number - self._first]

    def _find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = self._stream + numbers * self._num_streams
        epochs, within = np.divmod(places, len(self.lengths))
        documents, lengths = np.empty_like(within), np.empty_like(within)
        for epoch in np.unique(epochs):
            own = epochs == epoch
            key = epoch_key(self._seed, self.name, int(epoch))
            documents[own] = permute(within[own], len(self.lengths), key)
            lengths[own] = self.lengths[documents[own]]
            if self._bias is not None:
                is_read = self._bias.chosen(documents[own], lengths[own], key)
                lengths[own] = np.where(is_read, lengths[own], LEFT_OUT)
        return documents, lengths


class DocumentFeed:
    """Takes documents so that each corpus has its share of the tokens.

    The next document is one of the corpus that is furthest behind: whose tokens in this phase, over
    its weight, are fewest.

    Args:
        orders: Of the corpora.
        parts: Weights in each phase, by number of the corpus: whole numbers.
    """

    def __init__(self, orders: Sequence[DocumentOrder], parts: Sequence[Mapping[int, int]]) -> None:
        self._orders = orders
        self._parts = parts
        self.phase = 0
        # Documents taken of each corpus; its tokens in this phase.
        self.taken = np.zeros(len(orders), dtype=np.int64)
        self.fed = np.zeros(len(orders), dtype=np.int64)

    def take(self, count: int, phase: int) -> Documents:
        """The next documents.

        Args:
            count: Their number.
            phase: That the stream has come to.
        """
        if phase != self.phase:
            self.phase, self.fed = phase, np.zeros_like(self.fed)
        parts = self._parts[phase]
        common = math.lcm(*parts.values())
        steps = {corpus: common // part for corpus, part in parts.items()}
        # A tie is decided by the name: the number may be another one after a resume.
        behind = [
            (int(self.fed[corpus]) * step, self._orders[corpus].name, corpus)
            for corpus, step in steps.items()
        ]
        heapq.heapify(behind)
        taken, fed = self.taken.tolist(), self.fed.tolist()
        found: list[tuple[int, int, int]] = []
        while len(found) < count:
            served, name, corpus = behind[0]
            document, length = self._orders[corpus].get(taken[corpus])
            taken[corpus] += 1
            if length == LEFT_OUT:
                continue
            fed[corpus] += length
            # An empty document moves nothing on, but is passed over.
            heapq.heapreplace(behind, (served + length * steps[corpus], name, corpus))
            found.append((corpus, document, length))
        self.taken, self.fed = np.array(taken, dtype=np.int64), np.array(fed, dtype=np.int64)
        table = np.array(found, dtype=np.int64).reshape(-1, 3)
        return Documents(table[:, 0].astype(np.int32), table[:, 1], table[:, 2])


def epoch_key(seed: int, name: str, epoch: int) -> int:
    """Chooses the permutation of an epoch of a corpus, 64 bits."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{epoch}".encode())
    return int.from_bytes(digest.digest()[:8], "little")
