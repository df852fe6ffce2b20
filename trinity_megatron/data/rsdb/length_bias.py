"""Length-biased sampling: longer documents are read more often, for the extension of the context.

Source: Trinity technical report, section 3.5: the probability of a document rises from a floor of
1% to 90% at 128K tokens.  The report does not give the curve; here it is linear in the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# SplitMix64 (Steele, Lea and Flood, 2014), which passes BigCrush.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_BLOCK = 2**20  # documents that are in memory at a time


@dataclass(frozen=True)
class LengthBias:
    """The share of the documents of a length that an epoch reads.

    Attributes:
        floor: Of the shortest documents, above 0.
        ceiling: Of documents of ``tokens`` and more, at most 1.
        tokens: The length from which on the ceiling holds.
    """

    floor: float = 0.01
    ceiling: float = 0.9
    tokens: int = 131_072

    def share(self, lengths: np.ndarray) -> np.ndarray:
        """``floor + (ceiling - floor) * min(length / tokens, 1)``, float64 ``[n]``.

        Args:
            lengths: Tokens of documents, integers ``[n]``.
        """
        rise = np.minimum(np.asarray(lengths, dtype=np.float64) / self.tokens, 1.0)
        return self.floor + (self.ceiling - self.floor) * rise

    def chosen(self, documents: np.ndarray, lengths: np.ndarray, key: int) -> np.ndarray:
        """Which documents an epoch reads, bool ``[n]``: the same for the same arguments.

        Args:
            documents: Their numbers in the corpus, int64 ``[n]``.
            lengths: Their tokens, integers ``[n]``.
            key: Of the epoch, 64 bits: another one chooses other documents.
        """
        return uniform(documents, key) < self.share(lengths)

    def expected_tokens(self, lengths: np.ndarray) -> int:
        """Tokens that an epoch has on average.

        Args:
            lengths: Tokens of all documents, integers ``[n]``.
        """
        blocks = (lengths[at : at + _BLOCK] for at in range(0, len(lengths), _BLOCK))
        return round(sum(float((self.share(block) * block).sum()) for block in blocks))


def uniform(numbers: np.ndarray, key: int) -> np.ndarray:
    """A number in ``[0, 1)`` for each number, float64 ``[n]``: a hash of it and the key.

    Args:
        numbers: int64 ``[n]``.
        key: 64 bits.
    """
    with np.errstate(over="ignore"):
        mixed = np.uint64(key) + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
