"""Virtual streams of raw text: each makes every so many-th sample of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from trinity_megatron.data.text.corpus_reader import CorpusReader
from trinity_megatron.data.text.text_mixture import TextEncoder, TextMixture

State = dict[str, Any]


class TextPiece(NamedTuple):
    """A part of a document in a sequence.

    Attributes:
        document: Its number in the stream.
        tokens: Those in the sequence, and the one behind them where the document goes on, int32.
        length: Tokens in the sequence.
    """

    document: int
    tokens: np.ndarray
    length: int


class TextStream(ABC):
    """Makes the samples ``number``, ``number + num_streams``, ... of a run.

    Args:
        mixture: What all streams share.
        number: Of the stream.
        encoder: Of the documents.
    """

    def __init__(self, mixture: TextMixture, number: int, encoder: TextEncoder) -> None:
        self.mixture, self.number, self.encoder = mixture, number, encoder
        self.num_samples = 0
        self.readers = [
            CorpusReader(
                parts,
                seed=mixture.seed,
                stream=number,
                num_streams=mixture.num_streams,
                is_shuffled=mixture.order == "rsdb",
            )
            for parts in mixture.all_parts
        ]

    @property
    def sample(self) -> int:
        """Number of the next sample in the run."""
        return self.number + self.num_samples * self.mixture.num_streams

    def next(self) -> list[TextPiece]:
        """The pieces of the next sample, ``seq_length`` tokens together.

        Raises:
            UserError: A document cannot be read.
        """
        pieces = self._fill()
        self.num_samples += 1
        return pieces

    @abstractmethod
    def _fill(self) -> list[TextPiece]:
        """The pieces of the sample that is next."""

    def state(self) -> State:
        """What a resume needs: plain containers and arrays; corpora go by their names."""
        return {
            "num_samples": self.num_samples,
            "names": self.mixture.names,
            "positions": np.array([r.position for r in self.readers], dtype=np.int64),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: Of the same stream; the mixture may have further corpora, in another order.

        Raises:
            ValueError: It has documents of a corpus that the mixture does not name.
            UserError: A document cannot be read again, or is another one now.
        """
        self.num_samples = int(state["num_samples"])
        number_of = self._numbers(state)
        for number, position in zip(number_of, state["positions"], strict=True):
            if number >= 0:
                self.readers[number].seek(int(position))
            elif position:
                raise ValueError("it has documents of a corpus that the mixture does not name")

    def _numbers(self, state: Mapping[str, Any]) -> np.ndarray:
        """Numbers in this mixture of the corpora of a state, or -1."""
        places = {name: number for number, name in enumerate(self.mixture.names)}
        return np.array([places.get(name, -1) for name in state["names"]], dtype=np.int64)


class SequentialTextStream(TextStream):
    """Packs the documents of a corpus in the order in which they are read.

    A sample is of one corpus; what is left of its last document begins the next one of the corpus.
    """

    def __init__(self, mixture: TextMixture, number: int, encoder: TextEncoder) -> None:
        super().__init__(mixture, number, encoder)
        # The document of each corpus that is not finished: number and tokens; and its read head.
        self._open: dict[int, tuple[int, np.ndarray]] = {}
        self._heads = np.zeros(len(mixture.corpora), dtype=np.int64)

    def _fill(self) -> list[TextPiece]:
        assert self.mixture.schedule is not None
        corpus = int(self.mixture.schedule.locate(np.array([self.sample]))[0][0])
        missing, pieces = self.mixture.seq_length, []
        while missing:
            document, tokens = self._open.get(corpus) or self._read(corpus)
            head = int(self._heads[corpus])
            end = min(head + missing, len(tokens))
            missing -= end - head
            pieces.append(TextPiece(document, tokens[head : end + 1], end - head))
            if end == len(tokens):
                del self._open[corpus]
                self._heads[corpus] = 0
            else:
                self._heads[corpus] = end
        return pieces

    def _read(self, corpus: int) -> tuple[int, np.ndarray]:
        number, document = self.readers[corpus].next()
        self._open[corpus] = number, self.encoder.encode(document)
        return self._open[corpus]

    def state(self) -> State:
        """What a resume needs: 16 bytes for each corpus."""
        state = super().state()
        for corpus, (document, _) in self._open.items():
            state["positions"][corpus] = document
        return {**state, "heads": self._heads.copy()}

    def load(self, state: Mapping[str, Any]) -> None:
        """See :meth:`TextStream.load`."""
        super().load(state)
        for corpus, head in zip(self._numbers(state), state["heads"], strict=True):
            if not head:
                continue
            if corpus < 0:  # a first document, whose position is 0
                raise ValueError("it has a document of a corpus that the mixture does not name")
            expected = self.readers[corpus].position
            number, tokens = self._read(int(corpus))
            if number != expected or head >= len(tokens):
                raise self.readers[corpus].changed()
            self._heads[corpus] = head
