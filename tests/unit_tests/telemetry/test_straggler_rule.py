"""The slow rank is the one whose work is the largest beside its peers' in most steps."""

import numpy as np
import pytest

from trinity_megatron.telemetry.straggler_rule import (
    LEAST_STEPS,
    STRAGGLER_RATIO,
    WINDOW,
    find_slowest,
)


def noisy(ranks: int, seed: int, steps: int = WINDOW) -> np.ndarray:
    """Ranks that share the length of a step, and are a tenth apart by chance."""
    generator = np.random.default_rng(seed)
    common = generator.uniform(0.5, 2.0, size=(1, steps))
    return common * generator.normal(1.0, 0.1, size=(ranks, steps))


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_it_is_the_median_of_the_ratios_to_the_median_of_the_others(ranks: int) -> None:
    work = noisy(ranks, ranks)
    ratios = [
        np.median(work[rank] / np.median(np.delete(work, rank, axis=0), axis=0))
        for rank in range(ranks)
    ]
    found = find_slowest(work, [0] * ranks)
    assert found is not None and found.rank == np.argmax(ratios) and found.num_steps == WINDOW
    assert found.ratio == pytest.approx(max(ratios), rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_thirty_percent_is_found_and_chance_is_not(ranks: int) -> None:
    for seed in range(20):
        work = noisy(ranks, seed)
        even = find_slowest(work, [0] * ranks)
        assert even is not None and even.ratio < STRAGGLER_RATIO
        work[ranks // 2] *= 1.3
        slow = find_slowest(work, [0] * ranks)
        assert slow is not None and slow.rank == ranks // 2 and slow.ratio > STRAGGLER_RATIO


def test_single_slow_steps_are_no_straggler() -> None:
    work = np.ones((4, WINDOW))
    work[1, : WINDOW // 2 - 1] = 30.0
    found = find_slowest(work, [0] * 4)
    assert found is not None and found.ratio == 1.0


def test_only_ranks_of_one_stage_are_compared() -> None:
    work = np.ones((6, WINDOW))
    work[3:] *= 5.0  # a stage with more layers
    work[4] *= 1.3
    found = find_slowest(work, [0, 0, 0, 1, 1, 1])
    assert found is not None and found.rank == 4 and found.ratio == pytest.approx(1.3)
    assert find_slowest(work[:2], [0, 1]) is None


def test_steps_that_are_not_known_everywhere() -> None:
    work = np.ones((3, WINDOW))
    work[2] = 2.0
    work[0, : WINDOW - LEAST_STEPS] = np.nan
    found = find_slowest(work, [0] * 3)
    assert found is not None and (found.rank, found.num_steps) == (2, LEAST_STEPS)
    work[1, -1] = np.nan
    assert find_slowest(work, [0] * 3) is None
