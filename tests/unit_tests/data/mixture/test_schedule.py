"""The schedule against a count sample by sample."""

from fractions import Fraction

import numpy as np
import pytest

from trinity_megatron.data.mixture.schedule import (
    MAX_PARTS,
    MixtureSchedule,
    draw_block,
    whole_parts,
)

# Three phases of 2, 3 and 2 corpora; the second is shorter than a block, and none a multiple of it.
PHASES = [
    (0, {0: Fraction(7, 10), 1: Fraction(3, 10)}),
    (10_007, {0: Fraction(1, 3), 1: Fraction(1, 3), 2: Fraction(1, 3)}),
    (12_345, {1: Fraction("0.123"), 2: Fraction("0.877")}),
]
END = 25_000


@pytest.fixture(scope="module")
def schedule() -> MixtureSchedule:
    return MixtureSchedule(PHASES, num_corpora=3, seed=5)


def test_no_sample_of_a_corpus_is_lost_or_repeated(schedule: MixtureSchedule) -> None:
    corpora, numbers = schedule.locate(np.arange(END))
    for corpus in range(3):
        mine = numbers[corpora == corpus]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))


def test_weights_change_at_the_sample(schedule: MixtureSchedule) -> None:
    corpora, _ = schedule.locate(np.arange(END))
    ends = [start for start, _ in PHASES[1:]] + [END]
    for (start, weights), end in zip(PHASES, ends, strict=True):
        assert set(corpora[start:end]) == set(weights)
        taken = np.cumsum(corpora[start:end, None] == np.arange(3), axis=0)
        passed = np.arange(1, end - start + 1)
        for corpus, weight in weights.items():
            # At any point of the phase each corpus has had its share, to a sample or two.
            assert np.abs(taken[:, corpus] - float(weight) * passed).max() < len(weights)


def test_any_sample_can_be_asked_for(schedule: MixtureSchedule) -> None:
    corpora, numbers = schedule.locate(np.arange(END))
    chosen = np.random.default_rng(0).integers(0, END, 500)
    for got, whole in zip(schedule.locate(chosen), (corpora, numbers), strict=True):
        np.testing.assert_array_equal(got, whole[chosen])
    for end in (0, 1, 10_006, 10_007, 10_008, 12_345, 20_000, END):
        expected = np.bincount(corpora[:end], minlength=3)
        np.testing.assert_array_equal(schedule.count(end), expected)


def test_a_sample_of_a_corpus_is_found(schedule: MixtureSchedule) -> None:
    for sample in (0, 1, 10_007, 12_344, 12_345, END - 1):
        (corpus,), (number,) = schedule.locate(np.array([sample]))
        assert schedule.find(int(corpus), int(number), END) == sample
    assert schedule.find(0, END, END) is None


def test_a_later_phase_changes_nothing_before_it(schedule: MixtureSchedule) -> None:
    other = [*PHASES[:2], (11_000, {0: Fraction(1)})]
    changed = MixtureSchedule(other, num_corpora=3, seed=5)
    samples = np.arange(11_000)
    for one, two in zip(schedule.locate(samples), changed.locate(samples), strict=True):
        np.testing.assert_array_equal(one, two)


def test_seventeen_trillion_tokens_are_one_block(schedule: MixtureSchedule) -> None:
    # Sequences of 8,192 tokens; phases of 10T, 4T and 3T.
    starts = [0, 10 * 10**12 // 8192, 14 * 10**12 // 8192]
    phases = [(start, weights) for start, (_, weights) in zip(starts, PHASES, strict=True)]
    large = MixtureSchedule(phases, num_corpora=3, seed=5)
    last = 17 * 10**12 // 8192
    around = np.arange(last - 10_000, last)
    corpora, numbers = large.locate(around)
    for corpus in (1, 2):
        mine = numbers[corpora == corpus]
        np.testing.assert_array_equal(
            mine, large.count(last - 10_000)[corpus] + np.arange(len(mine))
        )
    assert large.count(last).sum() == last
    held = sum(p.turns.nbytes + p.ranks.nbytes for p in large.phases)
    assert held < 2**20


def test_no_rank_has_always_the_same_corpus() -> None:
    """Ranks take turns too: a period of the blend that divides theirs would keep them apart."""
    turns = draw_block([1, 1], seed=1, phase=0)
    for rank in range(8):
        assert 0.4 < turns[rank::8].mean() < 0.6


def test_weights_that_are_exact() -> None:
    assert whole_parts([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert whole_parts([Fraction(5), Fraction(10), Fraction(10)]) == [1, 2, 2]
    assert whole_parts([Fraction(1)]) == [1]


def test_weights_that_are_rounded() -> None:
    weights = [Fraction("0.3333333333"), Fraction("0.6666666657"), Fraction("0.000000001")]
    parts = whole_parts(weights)
    assert min(parts) >= 1 and sum(parts) <= MAX_PARTS
    shares = np.array(parts) / sum(parts)
    np.testing.assert_allclose(shares, [float(w) for w in weights], atol=3 / MAX_PARTS)
    many = whole_parts([Fraction(1, prime) for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23)])
    assert sum(many) <= MAX_PARTS


def test_the_draw_depends_on_seed_and_phase_alone() -> None:
    first = draw_block([7, 3], seed=1, phase=0)
    np.testing.assert_array_equal(first, draw_block([7, 3], seed=1, phase=0))
    assert (first != draw_block([7, 3], seed=2, phase=0)).any()
    assert (first != draw_block([7, 3], seed=1, phase=1)).any()
    # Written down: a resume under another release of numpy reads on in the same order.
    assert "".join(map(str, first[:24])) == "100001001000100101000100"
