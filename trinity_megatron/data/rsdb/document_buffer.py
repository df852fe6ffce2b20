"""The random sequential document buffer (RSDB).

Source: Trinity Large technical report, 3.2: documents wait in a buffer, each with a read head; a
sequence is filled from documents that are chosen uniformly, each from its read head until it ends
or the sequence is full; when the documents that are not finished are down to the buffer's size,
it is filled up in bulk to twice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from trinity_megatron.data.rsdb.feed import Documents

# Tokens of a document that are counted when it is chosen for the first time.
UNKNOWN = -1
_BITS_AHEAD = 1024  # a multiple of the four numbers that Philox makes at a time

State = dict[str, np.ndarray | int]


class Piece(NamedTuple):
    """A part of a document in a sequence.

    Attributes:
        corpus: Number of the corpus.
        document: Number of the document in it.
        start: Its first token that is taken.
        length: Tokens.
        rest: Tokens of the document behind it.
    """

    corpus: int
    document: int
    start: int
    length: int
    rest: int


class DocumentBuffer:
    """A buffer of documents, of which it knows names, lengths and read heads, not the tokens.

    A document comes at most once in a sequence: what is chosen ends, or fills the sequence.

    Args:
        documents: Documents down to which the buffer empties before it is filled up to twice of it.
        seed: Of the run.
        stream: Number of the virtual stream, whose choices are its own.
        measure: Counts the tokens of the document at a place, where they are ``UNKNOWN``.
    """

    def __init__(
        self,
        documents: int,
        *,
        seed: int,
        stream: int,
        measure: Callable[[int], int] | None = None,
    ) -> None:
        self.documents = documents
        self._measure = measure
        capacity = 2 * documents
        self._key = (seed % 2**64, stream)
        # The first ``num_active`` are not finished.
        self.corpora = np.zeros(capacity, dtype=np.int32)
        self.numbers = np.zeros(capacity, dtype=np.int64)
        self.heads = np.zeros(capacity, dtype=np.int64)
        self.lengths = np.zeros(capacity, dtype=np.int64)
        self.num_active = 0
        self.num_choices = 0
        self._bits: list[int] = []
        self._first_bits = 0

    def fill(self, num_tokens: int, take: Callable[[int], Documents]) -> list[Piece]:
        """The pieces of the next sequence.

        Args:
            num_tokens: Of the sequence.
            take: Gives the next so many documents; fewer at the end of what there is.

        Returns:
            In their order; together shorter than the sequence only when all documents are read.
        """
        pieces = []
        while num_tokens:
            if self.num_active <= self.documents:
                self._refill(take)
                if not self.num_active:
                    break
            place = self._choose()
            start, length = int(self.heads[place]), int(self.lengths[place])
            if length == UNKNOWN:
                length = self._count(place)
            taken = min(num_tokens, length - start)
            end = start + taken
            pieces.append(
                Piece(
                    int(self.corpora[place]), int(self.numbers[place]), start, taken, length - end
                )
            )
            num_tokens -= taken
            if end == length:
                self._remove(place)
            else:
                self.heads[place] = end
        return pieces

    def _refill(self, take: Callable[[int], Documents]) -> None:
        """Fill the buffer up; documents without tokens are passed over."""
        room = len(self.lengths) - self.num_active
        while room:
            new = take(room)
            if not len(new.lengths):
                return
            keep = new.lengths != 0
            end = self.num_active + int(keep.sum())
            place = slice(self.num_active, end)
            self.corpora[place], self.numbers[place] = new.corpora[keep], new.documents[keep]
            self.lengths[place], self.heads[place] = new.lengths[keep], 0
            room -= end - self.num_active
            self.num_active = end

    def _count(self, place: int) -> int:
        assert self._measure is not None
        length = self._measure(place)
        self.lengths[place] = length
        return length

    def _choose(self) -> int:
        """A place of an active document, all alike (to 2^-64 of their number)."""
        number = self.num_choices - self._first_bits
        if not 0 <= number < len(self._bits):
            block = self.num_choices // _BITS_AHEAD
            self._first_bits = block * _BITS_AHEAD
            counter = self._first_bits // 4
            # Raw bits: those of numpy's distributions may change from release to release.
            bits = np.random.Philox(key=self._key, counter=counter).random_raw(_BITS_AHEAD)
            self._bits = bits.tolist()
            number = self.num_choices - self._first_bits
        self.num_choices += 1
        return (self._bits[number] * self.num_active) >> 64

    def _remove(self, place: int) -> None:
        """Put the last active document in the place of a finished one."""
        self.num_active -= 1
        last = self.num_active
        for array in (self.corpora, self.numbers, self.heads, self.lengths):
            array[place] = array[last]

    def state(self) -> State:
        """What a resume needs: 20 bytes for each document, and the number of choices so far."""
        active = slice(self.num_active)
        return {
            "corpora": self.corpora[active].copy(),
            "numbers": self.numbers[active].copy(),
            "heads": self.heads[active].copy(),
            "num_choices": self.num_choices,
        }

    def load(self, state: Mapping[str, np.ndarray | int], lengths: np.ndarray) -> None:
        """Go on from a state.

        Args:
            state: Of a buffer of the same size, seed and stream.
            lengths: Tokens of its documents, int64 ``[num_active]``; ``UNKNOWN`` where they
                are to be counted.

        Raises:
            ValueError: It has more documents than this buffer, or heads beyond their ends.
        """
        heads = np.asarray(state["heads"])
        known = np.where(lengths == UNKNOWN, heads + 1, lengths)
        if len(heads) > len(self.lengths) or (heads >= known).any() or (heads < 0).any():
            raise ValueError("the state of the buffer does not fit the documents")
        self.num_active, self.num_choices = len(heads), int(state["num_choices"])
        active = slice(self.num_active)
        self.corpora[active], self.numbers[active] = state["corpora"], state["numbers"]
        self.heads[active], self.lengths[active] = heads, lengths
