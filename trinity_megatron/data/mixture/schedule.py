"""Which sample of a run comes from which corpus: a function of the sample's number.

Within a phase the corpora take turns in blocks that are all alike.  A block has a few thousand
samples, in which the number of each corpus's is exactly its weight; there the samples of a corpus
are stratified: one at a random place of each of its strata, so a batch of any size has nearly its
share of each, and no rank always the same corpus.  So the memory is that of one block for each
phase, whatever the length of the run.  The samples of a corpus are counted on over all phases:
none is lost or repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Weights are exact where their common denominator is at most this, else to one part of it.
MAX_PARTS = 2**16
# A block is at least so long.
_MIN_BLOCK = 4096
_JITTER_BITS = 20


def whole_parts(weights: Sequence[Fraction]) -> list[int]:
    """Weights as whole numbers in the same ratio.

    Args:
        weights: Above 0, at most ``MAX_PARTS``.

    Returns:
        Numbers from 1 on, without a common factor.  If that takes a sum above ``MAX_PARTS``, they
        are rounded to the largest remainders of a sum of ``MAX_PARTS``.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    parts = math.lcm(*(share.denominator for share in shares))
    if parts <= MAX_PARTS:
        return [int(share * parts) for share in shares]
    # One part for each, so that nobody is left out, and the rest by their shares.
    rest = MAX_PARTS - len(shares)
    whole = [int(share * rest) for share in shares]
    by_remainder = sorted(
        range(len(shares)), key=lambda index: (whole[index] - shares[index] * rest, index)
    )
    for index in by_remainder[: rest - sum(whole)]:
        whole[index] += 1
    counts = [count + 1 for count in whole]
    common = math.gcd(*counts)
    return [count // common for count in counts]


def draw_block(parts: Sequence[int], seed: int, phase: int) -> np.ndarray:
    """The turns of the corpora in a block.

    Args:
        parts: Of each corpus, from 1 on.
        seed: Of the run.
        phase: Number of the phase.

    Returns:
        Corpora (places in ``parts``), int32 ``[block]``; each comes a multiple of its part.
    """
    repeats = -(-_MIN_BLOCK // sum(parts))
    counts = np.asarray(parts, dtype=np.int64) * repeats
    block = int(counts.sum())
    corpora = np.repeat(np.arange(len(parts), dtype=np.int64), counts)
    stratum = np.arange(block) - np.repeat(np.cumsum(counts) - counts, counts)
    # Raw bits: those of numpy's distributions may change from release to release.
    bits = np.random.Philox(key=[seed % 2**64, phase]).random_raw(block)
    jitter = (bits >> np.uint64(64 - _JITTER_BITS)).astype(np.int64)
    place = ((stratum << _JITTER_BITS) + jitter) * block // counts[corpora]
    return corpora[np.lexsort((corpora, place))].astype(np.int32)


@dataclass(frozen=True)
class PhaseSchedule:
    """A phase.

    Attributes:
        start: Its first sample.
        corpora: Numbers of its corpora in the mixture, int64 ``[n]``.
        turns: Places in ``corpora``, int32 ``[block]``.
        ranks: How often the corpus of a turn had its turn before in the block, int32 ``[block]``.
        parts: Turns of each corpus in a block, int64 ``[n]``.
    """

    start: int
    corpora: np.ndarray
    turns: np.ndarray
    ranks: np.ndarray
    parts: np.ndarray

    @classmethod
    def make(
        cls, start: int, weights: Mapping[int, Fraction], *, seed: int, phase: int
    ) -> PhaseSchedule:
        """Draw the block of a phase.

        Args:
            start: Its first sample.
            weights: By number of the corpus, in the order that the draw depends on.
            seed: Of the run.
            phase: Number of the phase.
        """
        turns = draw_block(whole_parts(list(weights.values())), seed, phase)
        parts = np.bincount(turns, minlength=len(weights)).astype(np.int64)
        ranks = np.empty(len(turns), dtype=np.int32)
        for place, count in enumerate(parts):
            ranks[turns == place] = np.arange(count)
        return cls(start, np.array(list(weights), dtype=np.int64), turns, ranks, parts)

    def locate(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpora and numbers within the phase, of samples counted from its start."""
        block, turn = np.divmod(offsets, len(self.turns))
        place = self.turns[turn]
        return self.corpora[place], block * self.parts[place] + self.ranks[turn]

    def count(self, samples: int, num_corpora: int) -> np.ndarray:
        """Samples of each corpus among the first of the phase, int64 ``[num_corpora]``."""
        blocks, rest = divmod(samples, len(self.turns))
        counts = np.zeros(num_corpora, dtype=np.int64)
        begun = np.bincount(self.turns[:rest], minlength=len(self.parts))
        counts[self.corpora] = blocks * self.parts + begun
        return counts


class MixtureSchedule:
    """The schedule of a run; the last phase goes on for ever.

    Args:
        phases: First sample of each phase and its weights by number of the corpus; the first
            begins at 0.
        num_corpora: Of the mixture.
        seed: Of the run.
    """

    def __init__(
        self,
        phases: Sequence[tuple[int, Mapping[int, Fraction]]],
        *,
        num_corpora: int,
        seed: int,
    ) -> None:
        self.num_corpora = num_corpora
        self.phases = [
            PhaseSchedule.make(start, weights, seed=seed, phase=number)
            for number, (start, weights) in enumerate(phases)
        ]
        self.starts = np.array([phase.start for phase in self.phases], dtype=np.int64)
        # Samples of each corpus before each phase, [phases, corpora].
        self.before = np.zeros((len(self.phases), num_corpora), dtype=np.int64)
        for number in range(1, len(self.phases)):
            length = int(self.starts[number] - self.starts[number - 1])
            read = self.phases[number - 1].count(length, num_corpora)
            self.before[number] = self.before[number - 1] + read

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where samples of the run come from.

        Args:
            samples: Their numbers in the run, int64 ``[n]``.

        Returns:
            Their corpora, and their numbers among all of the run's from the corpus, both int64
            ``[n]``.
        """
        samples = np.asarray(samples, dtype=np.int64)
        of_phase = np.searchsorted(self.starts, samples, side="right") - 1
        corpora, numbers = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(of_phase):
            phase, chosen = self.phases[number], of_phase == number
            found, within = phase.locate(samples[chosen] - phase.start)
            corpora[chosen], numbers[chosen] = found, within + self.before[number, found]
        return corpora, numbers

    def count(self, samples: int) -> np.ndarray:
        """Samples of each corpus among the first of the run, int64 ``[num_corpora]``."""
        number = int(np.searchsorted(self.starts, samples, side="right")) - 1
        phase = self.phases[number]
        return self.before[number] + phase.count(samples - phase.start, self.num_corpora)

    def find(self, corpus: int, number: int, end: int) -> int | None:
        """The sample of the run that is a certain one of a corpus.

        Args:
            corpus: The corpus.
            number: Of the sample among those of the corpus.
            end: Samples of the run.

        Returns:
            None if the run ends before it.
        """
        low, high = 0, end
        while low < high:
            middle = (low + high) // 2
            if self.count(middle + 1)[corpus] > number:
                high = middle
            else:
                low = middle + 1
        return low if low < end else None
