"""Length-biased sampling: shares by length, the same documents after a resume, none twice."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from trinity_megatron.data.rsdb.feed import CorpusOrder, DocumentFeed, epoch_key
from trinity_megatron.data.rsdb.length_bias import LengthBias, uniform
from trinity_megatron.data.rsdb.permutation import permute
from trinity_megatron.data.rsdb.virtual_stream import BufferedMixture, VirtualStream

MASK = 2**64 - 1
BIAS = LengthBias(floor=0.1, ceiling=0.8, tokens=100)


def split_mix(number: int, key: int) -> float:
    """SplitMix64 in whole numbers."""
    mixed = (key + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return ((mixed ^ (mixed >> 31)) >> 11) / 2**53


def test_the_report_s_settings() -> None:
    shares = LengthBias().share(np.array([0, 65_536, 131_072, 10**6]))
    np.testing.assert_allclose(shares, [0.01, 0.455, 0.9, 0.9], rtol=1e-12)


def test_the_hash_is_split_mix() -> None:
    numbers = np.array([0, 1, 2, 12345, 2**40])
    for key in (0, 7, MASK):
        expected = [split_mix(int(number), key) for number in numbers]
        np.testing.assert_array_equal(uniform(numbers, key), expected)


@pytest.mark.parametrize("length", [0, 50, 100, 1000])
def test_documents_are_read_at_their_share(length: int) -> None:
    documents = np.arange(20_000)
    lengths = np.full(len(documents), length)
    share = float(BIAS.share(lengths)[0])
    read = [BIAS.chosen(documents, lengths, epoch_key(3, "web", epoch)) for epoch in range(4)]
    sigma = (share * (1 - share) / len(documents)) ** 0.5
    for chosen in read:
        assert abs(chosen.mean() - share) < 5 * sigma
    # Another epoch reads others: as many are in both as chance has it.
    assert abs((read[0] & read[1]).mean() - share**2) < 5 * share / len(documents) ** 0.5


def documents_of(feed: DocumentFeed, counts: list[int]) -> list[tuple[int, int]]:
    taken = [feed.take(count, 0) for count in counts]
    return [
        (int(document), int(length))
        for some in taken
        for document, length in zip(some.documents, some.lengths, strict=True)
    ]


def test_a_feed_has_the_chosen_documents_in_the_order_of_the_corpus() -> None:
    lengths = np.random.default_rng(1).integers(0, 150, 300)
    order = CorpusOrder("web", lengths, seed=5, stream=1, num_streams=3, bias=BIAS)
    found = documents_of(DocumentFeed([order], [{0: 1}]), [1, 40, 7, 100])
    expected: list[tuple[int, int]] = []
    for place in range(1, 10**6, 3):
        epoch, within = divmod(place, 300)
        key = epoch_key(5, "web", epoch)
        document = int(permute(np.array([within]), 300, key)[0])
        share = 0.1 + 0.7 * min(lengths[document] / 100, 1)
        if split_mix(document, key) < share:
            expected.append((document, int(lengths[document])))
        if len(expected) == len(found):
            break
    assert found == expected


def make(**given: Any) -> BufferedMixture:
    generator = np.random.default_rng(2)
    lengths = [generator.integers(1, 150, 200), generator.integers(1, 150, 100)]
    values: dict[str, Any] = {
        "names": ["long", "other"],
        "lengths": lengths,
        "starts": [0],
        "parts": [{0: 3, 1: 1}],
        "documents": 8,
        "num_streams": 2,
        "seed": 1,
        "seq_length": 64,
        "biases": {0: BIAS},
    }
    return BufferedMixture(**{**values, **given})


def test_the_weights_are_those_of_the_tokens_that_are_read() -> None:
    stream = VirtualStream(make(), 0)
    tokens = np.zeros(2)
    for _ in range(2000):
        for piece in stream.next():
            tokens[piece.corpus] += piece.length
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.01)


def test_a_stream_goes_on_exactly() -> None:
    whole, stopped, resumed = (VirtualStream(make(), 1) for _ in range(3))
    expected = [whole.next() for _ in range(50)]
    assert [stopped.next() for _ in range(20)] == expected[:20]
    resumed.load(stopped.state())
    assert [resumed.next() for _ in range(30)] == expected[20:]
    plain = VirtualStream(make(biases={}), 1)
    assert [plain.next() for _ in range(50)] != expected


def test_expected_tokens_are_those_of_many_epochs() -> None:
    lengths = np.random.default_rng(3).integers(0, 150, 2000)
    documents = np.arange(2000)
    chosen = partial(BIAS.chosen, documents, lengths)
    tokens = [lengths[chosen(epoch_key(1, "x", epoch))].sum() for epoch in range(40)]
    assert np.mean(tokens) == pytest.approx(BIAS.expected_tokens(lengths), rel=0.01)
