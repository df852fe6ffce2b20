"""Which rank is slower than those that do the same work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Steps that are looked at; fewer than the least say nothing.
WINDOW, LEAST_STEPS = 20, 10
# A rank whose work takes this much of its peers', in more than half of the steps, is a straggler,
# and is one until it is below the second: it does not come and go at every logging step.
STRAGGLER_RATIO, RECOVERED_RATIO = 1.15, 1.10


@dataclass(frozen=True)
class Slowest:
    """The rank with the most work among its peers.

    Attributes:
        rank: Its number.
        num_steps: Steps that were looked at.
        ratios: Work of every rank over the median of its peers', median of the steps, fp64
            ``[ranks]``; NaN where it has no peers.
    """

    rank: int
    num_steps: int
    ratios: np.ndarray

    @property
    def ratio(self) -> float:
        """That of the slowest rank."""
        return float(self.ratios[self.rank])


def find_slowest(work: np.ndarray, stages: Sequence[int]) -> Slowest | None:
    """The rank whose work takes longest beside that of the others of its pipeline stage.

    A ratio of each step cancels what concerns all ranks alike (a long sequence, a busy network);
    the median over the steps, what concerns a few steps only (a save, a page fault).

    Args:
        work: Seconds of each rank in each step, fp64 ``[ranks, steps]``; NaN where unknown.
        stages: Pipeline stage of each rank; ranks of one stage have the same layers.

    Returns:
        None where too few steps are known, or no stage has two ranks.
    """
    known = work[:, np.isfinite(work).all(axis=0)]
    num_steps = known.shape[1]
    if num_steps < LEAST_STEPS:
        return None
    ratios = np.full(len(stages), np.nan)
    for stage in sorted(set(stages)):
        ranks = np.flatnonzero(np.array(stages) == stage)
        if len(ranks) > 1:
            ratios[ranks] = np.median(_ratios(known[ranks]), axis=1)
    if np.isnan(ratios).all():
        return None
    return Slowest(int(np.nanargmax(ratios)), num_steps, ratios)


def _ratios(work: np.ndarray) -> np.ndarray:
    """Work of each rank over the median of the other ones, ``[ranks, steps]``.

    The median without one of the values follows from the sorted values: no loop over pairs.
    """
    count = len(work)
    order = np.sort(work, axis=0)
    place = np.argsort(np.argsort(work, axis=0), axis=0)

    def without(index: int) -> np.ndarray:
        """The value at a place of the sorted others."""
        return np.where(place <= index, order[index + 1], order[index])

    low, high = (count - 2) // 2, (count - 1) // 2
    others = (without(low) + without(high)) / 2
    return work / np.maximum(others, 1e-9)
