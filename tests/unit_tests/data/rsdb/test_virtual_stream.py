"""Virtual streams over several corpora: shares, epochs, ranks and resumes."""

from dataclasses import replace

import numpy as np
import pytest

from trinity_megatron.data.rsdb.document_buffer import Piece
from trinity_megatron.data.rsdb.feed import CorpusOrder
from trinity_megatron.data.rsdb.virtual_stream import BufferedMixture, VirtualStream


def make(num_streams: int = 4, **given: object) -> BufferedMixture:
    generator = np.random.default_rng(2)
    lengths = [generator.integers(1, longest, count) for longest, count in ((60, 90), (500, 40))]
    values = {
        "names": ("web", "code"),
        "lengths": lengths,
        "starts": (0, 900),
        "parts": ({0: 7, 1: 3}, {1: 1}),
        "documents": 8,
        "num_streams": num_streams,
        "seed": 5,
        "seq_length": 64,
    }
    return BufferedMixture(**{**values, **given})


def run(mixture: BufferedMixture, samples: int) -> list[list[Piece]]:
    streams = [VirtualStream(mixture, number) for number in range(mixture.num_streams)]
    return [streams[sample % len(streams)].next() for sample in range(samples)]


def test_the_streams_deal_out_every_document_of_an_epoch_once() -> None:
    lengths = np.arange(1, 91)
    orders = [CorpusOrder("a", lengths, seed=1, stream=s, num_streams=4) for s in range(4)]
    epochs: list[list[int]] = [[], [], []]
    for place in range(3 * 90):
        document, length = orders[place % 4].get(place // 4)
        assert length == lengths[document]
        epochs[place // 90].append(document)
    assert all(sorted(epoch) == list(range(90)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_no_token_is_lost_or_doubled_over_epochs() -> None:
    mixture = make()
    tokens = [np.zeros(len(lengths), dtype=np.int64) for lengths in mixture.lengths]
    streams = [VirtualStream(mixture, number) for number in range(4)]
    for sample in range(800):
        for piece in streams[sample % 4].next():
            tokens[piece.corpus][piece.document] += piece.length
    entered = [np.zeros(len(lengths), dtype=np.int64) for lengths in mixture.lengths]
    for number, stream in enumerate(streams):
        buffer = stream.buffer
        for place in range(buffer.num_active):  # what is not yet read to its end waits there
            rest = buffer.lengths[place] - buffer.heads[place]
            tokens[buffer.corpora[place]][buffer.numbers[place]] += rest
        for corpus, name in enumerate(mixture.names):
            lengths = mixture.lengths[corpus]
            order = CorpusOrder(name, lengths, seed=5, stream=number, num_streams=4)
            for taken in range(int(stream.feed.taken[corpus])):
                entered[corpus][order.get(taken)[0]] += 1
    for corpus, lengths in enumerate(mixture.lengths):
        np.testing.assert_array_equal(tokens[corpus], entered[corpus] * lengths)
        assert entered[corpus].max() > 1  # of more than one epoch


def test_the_corpora_have_their_shares() -> None:
    mixture = make()
    tokens = np.zeros((1800, 2))
    for sample, pieces in enumerate(run(mixture, 1800)):
        for piece in pieces:
            tokens[sample, piece.corpus] += piece.length
    assert tokens[100:900].sum(axis=0)[0] / tokens[100:900].sum() == pytest.approx(0.7, abs=0.02)
    # The documents of the phase before are read to their end.
    assert tokens[900:950, 0].sum() > 0 and tokens[1500:, 0].sum() == 0


def test_documents_of_several_corpora_meet_in_a_sequence() -> None:
    sequences = run(make(seq_length=256), 60)
    mixed = [len({piece.corpus for piece in pieces}) > 1 for pieces in sequences]
    assert sum(mixed) > 30


@pytest.mark.parametrize("samples", [0, 1, 200, 400])
def test_a_resume_is_exact(samples: int) -> None:
    mixture = make()
    uninterrupted, stream = VirtualStream(mixture, 3), VirtualStream(mixture, 3)
    whole = [uninterrupted.next() for _ in range(samples + 50)]
    for _ in range(samples):
        stream.next()
    resumed = VirtualStream(mixture, 3)
    resumed.load(stream.state())
    assert [resumed.next() for _ in range(50)] == whole[samples:]
    # A corpus that comes later, and another order of the file, change the numbers alone.
    more = replace(
        mixture,
        names=("late", "code", "web"),
        lengths=(np.array([5]), mixture.lengths[1], mixture.lengths[0]),
        parts=({2: 7, 1: 3}, {1: 1}, {0: 1}),
        starts=(0, 900, 10**6),
    )
    renumbered = VirtualStream(more, 3)
    renumbered.load(stream.state())
    found = [[p._replace(corpus=2 - p.corpus) for p in renumbered.next()] for _ in range(50)]
    assert found == whole[samples:]


def test_a_state_of_other_documents_is_refused() -> None:
    mixture = make()
    stream = VirtualStream(mixture, 0)
    stream.next()
    with pytest.raises(ValueError, match="web has fewer documents"):
        fewer = replace(mixture, lengths=(mixture.lengths[0][:3], mixture.lengths[1]))
        VirtualStream(fewer, 0).load(stream.state())
    with pytest.raises(ValueError, match="a corpus that the mixture does not name"):
        VirtualStream(replace(mixture, names=("web", "other")), 0).load(stream.state())


def test_the_state_is_small() -> None:
    """128 KB for a buffer of 4,096 documents, whatever the length of the run."""
    stream = VirtualStream(make(documents=2048), 0)
    for _ in range(50):
        stream.next()
    arrays = [value for value in stream.state().values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) < 128 * 2**10
