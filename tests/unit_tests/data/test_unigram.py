"""Entropy of token frequencies."""

import math

import numpy as np
import pytest

from trinity_megatron.data.unigram import unigram_entropy


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
def test_entropy_of_equal_counts_is_the_logarithm_of_their_number(size):
    assert unigram_entropy([3] * size) == pytest.approx(math.log(size), abs=1e-12)


def test_entropy_ignores_absent_tokens_order_and_scale():
    counts = np.array([5, 0, 1, 900, 0, 33])

    expected = unigram_entropy(counts)
    assert expected == pytest.approx(unigram_entropy(counts[[3, 0, 2, 5]]), rel=1e-12)
    assert expected == pytest.approx(unigram_entropy(counts * 10**9), rel=1e-12)
    assert 0 < expected < math.log(4)
    assert unigram_entropy([0, 8, 0]) == 0.0


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1]])
def test_entropy_of_nothing_is_refused(counts):
    with pytest.raises(ValueError, match="counts must be non-negative with a positive sum"):
        unigram_entropy(counts)
