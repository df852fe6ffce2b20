"""The permutation hits every place once, and leaves no pattern."""

import numpy as np
import pytest

from trinity_megatron.data.rsdb.permutation import permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097, 65_536, 65_537, 100_003])
def test_every_place_is_hit_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        sent = permute(np.arange(size), size, key)
        np.testing.assert_array_equal(np.sort(sent), np.arange(size))


@pytest.mark.parametrize("size", [5000, 70_000])
def test_any_part_can_be_asked_for(size: int) -> None:
    whole = permute(np.arange(size), size, 7)
    chosen = np.random.default_rng(0).integers(0, size, 100)
    np.testing.assert_array_equal(permute(chosen, size, 7), whole[chosen])


def test_trillions_are_permuted() -> None:
    size = 3 * 10**12
    places = np.arange(size - 1000, size)
    sent = permute(places, size, 1)
    assert len(np.unique(sent)) == 1000 and 0 <= sent.min() and sent.max() < size
    assert abs(sent.mean() / size - 0.5) < 0.05


def test_it_is_like_a_random_one() -> None:
    size, draws = 17, 3000
    counts = np.zeros((size, size))
    for key in range(draws):
        counts[np.arange(size), permute(np.arange(size), size, key)] += 1
    # 256 degrees of freedom: 350 is passed by 1 of 10,000.
    assert ((counts - draws / size) ** 2 / (draws / size)).sum() < 350
    # A large one: where neighbours go, by tenths.
    size, sent = 100_000, permute(np.arange(100_000), 100_000, 3)
    pairs = np.bincount(sent[:-1] * 10 // size * 10 + sent[1:] * 10 // size, minlength=100)
    assert ((pairs - size / 100) ** 2 / (size / 100)).sum() < 160
    # Neighbours do not stay together, nor come in the same direction.
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(sent, np.arange(100_000))[0, 1]) < 0.01
