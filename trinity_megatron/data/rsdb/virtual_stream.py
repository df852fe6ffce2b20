"""Virtual streams: the run's sequences are dealt to them in turn, whatever ranks there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from trinity_megatron.data.rsdb.document_buffer import DocumentBuffer, Piece
from trinity_megatron.data.rsdb.feed import CorpusOrder, DocumentFeed
from trinity_megatron.data.rsdb.length_bias import LengthBias


@dataclass(frozen=True)
class BufferedMixture:
    """What all streams of a run share.

    Attributes:
        names: Of the corpora.
        lengths: Tokens of the documents of each corpus.
        starts: First sample of each phase.
        parts: Weights in each phase, by number of the corpus: whole numbers.
        documents: Of a stream's buffer, see :class:`DocumentBuffer`.
        num_streams: Number of streams.
        seed: Of the run.
        seq_length: Tokens of a sample.
        biases: Of the corpora whose longer documents are read more often, by number.
    """

    names: Sequence[str]
    lengths: Sequence[np.ndarray]
    starts: Sequence[int]
    parts: Sequence[Mapping[int, int]]
    documents: int
    num_streams: int
    seed: int
    seq_length: int
    biases: Mapping[int, LengthBias] = field(default_factory=dict)

    def phase_of(self, sample: int) -> int:
        """The phase that a sample of the run is in."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1


class VirtualStream:
    """Makes every ``num_streams``-th sample of a run.

    Args:
        mixture: What all streams share.
        number: Of the stream: it makes the samples ``number``, ``number + num_streams``, ...
    """

    def __init__(self, mixture: BufferedMixture, number: int) -> None:
        self.mixture, self.number = mixture, number
        self.num_samples = 0
        self.buffer = DocumentBuffer(mixture.documents, seed=mixture.seed, stream=number)
        orders = [
            CorpusOrder(
                name,
                lengths,
                seed=mixture.seed,
                stream=number,
                num_streams=mixture.num_streams,
                bias=mixture.biases.get(corpus),
            )
            for corpus, (name, lengths) in enumerate(
                zip(mixture.names, mixture.lengths, strict=True)
            )
        ]
        self.feed = DocumentFeed(orders, mixture.parts)

    def next(self) -> list[Piece]:
        """The pieces of the next sample, ``seq_length`` tokens together."""
        sample = self.number + self.num_samples * self.mixture.num_streams
        take = partial(self.feed.take, phase=self.mixture.phase_of(sample))
        pieces = self.buffer.fill(self.mixture.seq_length, take)
        self.num_samples += 1
        return pieces

    def state(self) -> dict[str, Any]:
        """What a resume needs, in plain containers and arrays; corpora go by their names."""
        used = np.flatnonzero(self.feed.taken)
        return {
            "num_samples": self.num_samples,
            "names": list(self.mixture.names),
            "phase": self.feed.phase,
            "used": used,
            "taken": self.feed.taken[used],
            "fed": self.feed.fed[used],
            **self.buffer.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: Of the same stream; the mixture may have further corpora, in another order.

        Raises:
            ValueError: It does not fit the documents of the mixture.
        """
        places = {name: number for number, name in enumerate(self.mixture.names)}
        if not {state["names"][number] for number in state["used"]} <= places.keys():
            raise ValueError("it has documents of a corpus that the mixture does not name")
        number_of = np.array([places.get(name, -1) for name in state["names"]], dtype=np.int32)
        corpora = number_of[state["corpora"]]
        numbers = np.asarray(state["numbers"])
        lengths = np.zeros(len(numbers), dtype=np.int64)
        for corpus in np.unique(corpora):
            chosen = corpora == corpus
            known = self.mixture.lengths[corpus]
            if numbers[chosen].max() >= len(known):
                raise ValueError(f"{self.mixture.names[corpus]} has fewer documents than then")
            lengths[chosen] = known[numbers[chosen]]
        self.buffer.load({**state, "corpora": corpora}, lengths)
        self.num_samples = int(state["num_samples"])
        used = number_of[state["used"]]
        self.feed.phase = int(state["phase"])
        self.feed.taken[used], self.feed.fed[used] = state["taken"], state["fed"]
