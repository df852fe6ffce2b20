"""Megatron's load-balanced cut of a sequence over context-parallel ranks, as arithmetic.

Of the 2 cp chunks of a sequence, rank r has chunks r and 2 cp - 1 - r
(``megatron.core.utils.get_batch_on_this_cp_rank``).  A query of a local layer sees the window
before it, so a rank needs its chunks and the window before each of them, whatever the sequence.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Span(NamedTuple):
    """Consecutive positions, or rows, from ``start`` to before ``end``."""

    start: int
    end: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.end - self.start


class Part(NamedTuple):
    """Rows that a rank has: keys of another one's queries, or its own."""

    rank: int
    rows: Span


@dataclass(frozen=True)
class ZigzagCut:
    """A sequence, cut over context-parallel ranks.

    Attributes:
        num_tokens: Of the sequence; a multiple of 2 * ``size``.
        size: Context-parallel ranks.
    """

    num_tokens: int
    size: int

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk."""
        return self.num_tokens // (2 * self.size)

    def spans_of(self, rank: int) -> tuple[Span, Span]:
        """Positions of the two chunks of a rank, in the order of its rows."""
        length = self.chunk_length
        low, high = (
            Span(chunk * length, (chunk + 1) * length) for chunk in (rank, 2 * self.size - 1 - rank)
        )
        return low, high

    def keys_of(self, rank: int, window: int | None) -> tuple[Span, ...]:
        """Positions that the queries of a rank see, rising, apart from each other.

        Args:
            rank: In the group.
            window: Keys that a query sees, its own included; None for the whole sequence.
        """
        if window is None:
            return (Span(0, self.num_tokens),)
        low, high = (
            Span(max(0, span.start - window + 1), span.end) for span in self.spans_of(rank)
        )
        return (Span(low.start, high.end),) if high.start <= low.end else (low, high)

    def parts_of(self, rank: int, window: int | None) -> tuple[Part, ...]:
        """What :meth:`keys_of` consists of, in that order."""
        length, parts = self.chunk_length, []
        for span in self.keys_of(rank, window):
            for chunk in range(span.start // length, -(-span.end // length)):
                owner = min(chunk, 2 * self.size - 1 - chunk)
                # From positions to the owner's rows: its first half, or the second one.
                moved = (0 if chunk == owner else length) - chunk * length
                start = max(span.start, chunk * length) + moved
                end = min(span.end, (chunk + 1) * length) + moved
                parts.append(Part(owner, Span(start, end)))
        return tuple(parts)


@dataclass(frozen=True)
class WindowExchange:
    """What a rank sends and receives for the windows of all ranks' queries.

    Attributes:
        rank: The rank.
        parts: Keys of the rank, in order of position.
        sent: For each rank of the group, the rows that go there, in the order of its keys.
    """

    rank: int
    parts: tuple[Part, ...]
    sent: tuple[tuple[Span, ...], ...]

    @property
    def num_sent(self) -> list[int]:
        """Rows that go to each rank."""
        return [sum(span.length for span in spans) for spans in self.sent]

    @property
    def num_received(self) -> list[int]:
        """Rows that come from each rank."""
        counts = [0] * len(self.sent)
        for owner, rows in self.parts:
            counts[owner] += rows.length if owner != self.rank else 0
        return counts


@lru_cache(maxsize=32)
def plan_exchange(cut: ZigzagCut, rank: int, window: int) -> WindowExchange:
    """Plan the exchange of a rank, without asking the others.

    Where a window is no longer than a chunk, a rank sends ``window - 1`` rows of each of its chunks
    to the owner of the next one, if that is another rank: 2 (window - 1) rows for most ranks, half
    of it for the first and the last one.

    Args:
        cut: Of the sequence.
        rank: In the group.
        window: Keys that a query sees, its own included.
    """
    sent = []
    for other in range(cut.size):
        parts = () if other == rank else cut.parts_of(other, window)
        sent.append(tuple(rows for owner, rows in parts if owner == rank))
    return WindowExchange(rank, cut.parts_of(rank, window), tuple(sent))
