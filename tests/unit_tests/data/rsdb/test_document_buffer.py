"""The buffer: uniform choices, nothing lost or doubled, exact resume, long documents."""

from collections.abc import Callable

import numpy as np
import pytest

from trinity_megatron.data.rsdb.document_buffer import DocumentBuffer, Piece
from trinity_megatron.data.rsdb.feed import Documents


def source(lengths: list[int], start: int = 0) -> Callable[[int], Documents]:
    """All documents once, in their order."""
    position = start

    def take(count: int) -> Documents:
        nonlocal position
        numbers = np.arange(position, min(position + count, len(lengths)))
        position += len(numbers)
        return Documents(np.zeros(len(numbers), np.int32), numbers, np.array(lengths)[numbers])

    return take


def drain(buffer: DocumentBuffer, num_tokens: int, take: Callable) -> list[list[Piece]]:
    """Sequences until there are no more documents."""
    sequences = []
    while pieces := buffer.fill(num_tokens, take):
        sequences.append(pieces)
    return sequences


def random_lengths(count: int, longest: int = 200, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, longest, count).tolist()


@pytest.mark.parametrize(
    ("documents", "lengths"),
    [
        (16, random_lengths(500)),
        (1, random_lengths(50)),
        (64, random_lengths(20)),  # fewer than the buffer holds
        (8, [10_000, *random_lengths(60), 5000]),  # longer than all else in the buffer
    ],
)
def test_every_token_comes_once(documents: int, lengths: list[int]) -> None:
    seq_length = 64
    buffer = DocumentBuffer(documents, seed=1, stream=0)
    sequences = drain(buffer, seq_length, source(lengths))
    sizes = [sum(piece.length for piece in pieces) for pieces in sequences]
    assert set(sizes[:-1]) == {seq_length} and 0 < sizes[-1] <= seq_length
    read = np.zeros(len(lengths), dtype=int)
    for pieces in sequences:
        names = [piece.document for piece in pieces]
        assert len(set(names)) == len(names), "a document twice in a sequence"
        for piece in pieces:
            # Each document is read from its beginning to its end, in order.
            assert piece.start == read[piece.document] and piece.length > 0
            read[piece.document] += piece.length
            assert piece.rest == lengths[piece.document] - read[piece.document]
    np.testing.assert_array_equal(read, lengths)


def test_choices_are_uniform() -> None:
    """A chi-square of the places that are chosen among 48 documents that never end."""
    buffer, draws = DocumentBuffer(32, seed=3, stream=5), 48_000
    endless = source([10**9] * 48)
    chosen = [buffer.fill(1, endless)[0].document for _ in range(draws)]
    expected = draws / 48
    statistic = ((np.bincount(chosen, minlength=48) - expected) ** 2 / expected).sum()
    # 47 degrees of freedom; 1 of 10,000 is outside of 18 to 92.
    assert 18 < statistic < 92
    pairs = np.bincount(np.array(chosen[:-1]) // 6 * 8 + np.array(chosen[1:]) // 6, minlength=64)
    expected = (draws - 1) / 64
    # No choice depends on the one before it: 49 degrees of freedom.
    assert 19 < ((pairs - expected) ** 2 / expected).sum() < 95


def test_it_is_filled_up_in_bulk_at_its_size() -> None:
    taken = []
    lengths = random_lengths(400, 30)
    take = source([max(1, length) for length in lengths])

    def observed(count: int) -> Documents:
        taken.append((count, buffer.num_active))
        return take(count)

    buffer = DocumentBuffer(10, seed=0, stream=0)
    for _ in range(20):
        buffer.fill(100, observed)
    assert taken[0] == (20, 0)
    # At 10 documents that are not finished, up to 20.
    assert len(taken) > 5 and set(taken[1:]) == {(10, 10)}


def test_streams_choose_for_themselves() -> None:
    orders = set()
    for seed, stream in ((0, 0), (0, 1), (1, 0)):
        buffer = DocumentBuffer(32, seed=seed, stream=stream)
        sequences = drain(buffer, 64, source(random_lengths(100)))
        orders.add(tuple(piece.document for pieces in sequences for piece in pieces))
    assert len(orders) == 3


@pytest.mark.parametrize("stop", [0, 1, 7, 100, 250])
def test_a_resume_is_exact(stop: int) -> None:
    lengths = random_lengths(600)
    whole = drain(DocumentBuffer(16, seed=1, stream=2), 64, source(lengths))
    buffer, take, taken = DocumentBuffer(16, seed=1, stream=2), source(lengths), 0

    def counted(count: int) -> Documents:
        nonlocal taken
        found = take(count)
        taken += len(found.lengths)
        return found

    before = [buffer.fill(64, counted) for _ in range(stop)]
    state, rest = buffer.state(), source(lengths, start=taken)
    drain(buffer, 64, counted)  # what goes on does not change the state that was taken
    resumed = DocumentBuffer(16, seed=1, stream=2)
    resumed.load(state, np.array(lengths)[state["numbers"]])
    assert before + drain(resumed, 64, rest) == whole


def test_a_state_that_does_not_fit_is_refused() -> None:
    buffer = DocumentBuffer(4, seed=0, stream=0)
    buffer.fill(10, source([100] * 20))
    state = buffer.state()
    with pytest.raises(ValueError, match="does not fit"):
        DocumentBuffer(4, seed=0, stream=0).load(state, np.full(8, 3))
    with pytest.raises(ValueError, match="does not fit"):
        DocumentBuffer(2, seed=0, stream=0).load(state, np.full(8, 100))
