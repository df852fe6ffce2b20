"""The documents of a corpus in the order in which a virtual stream takes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from trinity_megatron.data.rsdb.feed import epoch_key
from trinity_megatron.data.rsdb.permutation import permute
from trinity_megatron.data.text.parts import Document, Parts, Row
from trinity_megatron.data.text.token_parts import TokenParts
from trinity_megatron.errors import UserError

# A document is known by the turn of its part in the stream, and its row in the part.
_ROW_BITS = 32


def join_number(turn: int, row: int) -> int:
    """The number of a document; numbers grow in the order of reading."""
    return turn << _ROW_BITS | row


def split_number(number: int) -> tuple[int, int]:
    """Turn and row of a document."""
    return number >> _ROW_BITS, number & (1 << _ROW_BITS) - 1


class CorpusReader:
    """Reads the parts that are a stream's, epoch after epoch.

    Args:
        parts: Of the corpus.
        seed: Of the run.
        stream: Number of the virtual stream.
        num_streams: Their number: they take turns in the parts.
        is_shuffled: Whether each epoch has the parts in an order of its own.
    """

    def __init__(
        self,
        parts: Parts | TokenParts,
        *,
        seed: int,
        stream: int,
        num_streams: int,
        is_shuffled: bool,
    ) -> None:
        self.parts = parts
        self._seed, self._stream, self._num_streams = seed, stream, num_streams
        self._is_shuffled = is_shuffled
        # Number of the next document, or one before it.
        self.position = 0
        self._rows: Iterator[Row] | None = None

    def next(self) -> tuple[int, Document]:
        """Number and content of the next document.

        Raises:
            UserError: It cannot be read, or the parts of the stream hold no text.
        """
        for _ in range(len(self.parts) + self._num_streams + 1):
            turn, first = split_number(self.position)
            if self._rows is None:
                self._rows = self.parts.read(self._find(turn), first.__le__)
            for row, document in self._rows:
                self.position = join_number(turn, row + 1)
                if len(document):
                    return join_number(turn, row), document
            self._rows = None
            self.position = join_number(turn + 1, 0)
        raise UserError(
            f"{self.parts.corpus.key} holds no text for a stream: all its rows are empty. Remedy: "
            "more data, or drop the corpus."
        )

    def seek(self, position: int) -> None:
        """Go on at another document."""
        self.position, self._rows = position, None

    def fetch(self, numbers: Collection[int]) -> dict[int, Document]:
        """Read some documents again.

        Args:
            numbers: Of documents that this stream has read.

        Raises:
            UserError: One is not there any more, or cannot be read.
        """
        found: dict[int, Document] = {}
        by_turn: dict[int, set[int]] = {}
        for number in numbers:
            turn, row = split_number(number)
            by_turn.setdefault(turn, set()).add(row)
        for turn, wanted in sorted(by_turn.items()):
            part, last = self._find(turn), max(wanted)
            for row, document in self.parts.read(part, wanted.__contains__):
                found[join_number(turn, row)] = document
                if row == last:
                    break
            missing = [row for row in wanted if not len(found.get(join_number(turn, row), ""))]
            if missing:
                raise self.changed(part)
        return found

    def changed(self, part: int | None = None) -> UserError:
        """The error of a corpus that is not what the checkpoint has read."""
        what = ""
        if part is not None:
            what = f": {self.parts.path_of(part)} has not the rows of then"
        return UserError(
            f"{self.parts.corpus.key} has changed since the checkpoint{what}. Remedy: the files of "
            "that run, or --allow-data-change to begin with empty buffers."
        )

    @property
    def epoch(self) -> int:
        """How many times the parts were all read before the present one."""
        return self.epoch_of(self.position)

    def epoch_of(self, position: int) -> int:
        """The epoch of a document's part."""
        turn, _ = split_number(position)
        return (self._stream + turn * self._num_streams) // len(self.parts)

    def _find(self, turn: int) -> int:
        epoch, within = divmod(self._stream + turn * self._num_streams, len(self.parts))
        if self._is_shuffled:
            key = epoch_key(self._seed, self.parts.corpus.name, epoch)
            return int(permute(np.array([within]), len(self.parts), key)[0])
        # Moved on, so that a stream reads other parts in another epoch.
        return (within + epoch) % len(self.parts)
