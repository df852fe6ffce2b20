"""The loader of raw text: workers read, tokenise and pack it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trinity_megatron.data.text.buffered_stream import make_stream
from trinity_megatron.data.text.packed_state import pack_documents, unpack_documents
from trinity_megatron.data.text.text_mixture import TextEncoder, TextMixture
from trinity_megatron.errors import UserError
from trinity_megatron.process.screen import tell, tell_once
from trinity_megatron.training.datasets.stream_loader import (
    PackedSamples,
    ReadingRank,
    StreamLoader,
    samples_before,
)
from trinity_megatron.training.datasets.texts import contents_of

# Samples that each worker makes ahead, so that a refill of a buffer stops nobody.
_AHEAD = 4

State = dict[str, Any]


@dataclass(frozen=True)
class MadeSample:
    """A sample, and what the stream is behind it.

    Attributes:
        stream: Number of the stream.
        sample: As Megatron's datasets give it.
        state: Of the stream.
        notices: What has been left out of the text.
    """

    stream: int
    sample: dict[str, torch.Tensor]
    state: State
    notices: list[str]


class TextSamples(torch.utils.data.IterableDataset):
    """The samples of some streams in turn, without an end: the work of one worker.

    What a user can mend is handed on as it is; torch's loader would put a trace around it.

    Args:
        mixture: What all streams share.
        samples: Packs the pieces.
        states: Of the streams, by number, in their turn.
    """

    def __init__(
        self, mixture: TextMixture, samples: PackedSamples, states: Mapping[int, State]
    ) -> None:
        self.mixture, self.samples, self.states = mixture, samples, states

    def __iter__(self) -> Iterator[MadeSample | UserError]:
        try:
            yield from self._make()
        except UserError as error:
            yield error

    def _make(self) -> Iterator[MadeSample]:
        encoder = TextEncoder(self.mixture.tokenizer)
        streams = [make_stream(self.mixture, number, encoder) for number in self.states]
        for stream in streams:
            state = self.states[stream.number]
            if "positions" in state:
                stream.load(state)
            stream.num_samples = state["num_samples"]
        while True:
            for stream in streams:
                pieces = stream.next()
                parts = [piece.tokens[: piece.length] for piece in pieces[:-1]]
                parts.append(pieces[-1].tokens)
                sample = self.samples.pack(parts, [piece.document for piece in pieces])
                notices = [line for of in self.mixture.all_parts for line in of.take_notices()]
                yield MadeSample(stream.number, sample, stream.state(), notices)


class TextLoader(StreamLoader):
    """Samples of a rank, made by workers: each has some of its streams.

    So the samples do not depend on the number of workers.

    Args:
        mixture: What all streams share.
        samples: Packs the pieces.
        rank: Which samples are read.
        consumed: Samples of the run so far.
        num_workers: Processes; 0 for this one.
    """

    def __init__(
        self,
        mixture: TextMixture,
        samples: PackedSamples,
        rank: ReadingRank,
        consumed: int,
        num_workers: int,
    ) -> None:
        super().__init__(mixture.num_streams, rank, consumed)
        self.mixture, self.samples = mixture, samples
        self._workers = max(1, min(num_workers, len(self.numbers)))
        self._is_apart = num_workers > 0
        self._state_of: dict[int, State] = {
            number: {"num_samples": samples_before(consumed, number, mixture.num_streams)}
            for number in self.numbers
        }
        self._iterators: dict[int, Iterator[Any]] = {}
        self._epochs: dict[str, int] = {}

    def save_state(self) -> dict[str, Any]:
        """See :meth:`StreamLoader.save_state`; with the content of the corpora."""
        contents = contents_of(self.mixture.corpora, self.mixture.order)
        return {**super().save_state(), "contents": contents}

    def _make(self, stream: int) -> dict[str, torch.Tensor]:
        if not self._iterators:
            self._start()
        made = next(self._iterators[stream])
        if isinstance(made, UserError):
            raise made
        assert made.stream == stream, (made.stream, stream)
        self._state_of[stream] = made.state
        self._report_epochs(made)
        for line in made.notices:
            tell(f"> {line}")
        return made.sample

    def _start(self) -> None:
        for worker in range(self._workers):
            numbers = self.numbers[worker :: self._workers]
            states = {number: self._state_of[number] for number in numbers}
            loader = torch.utils.data.DataLoader(
                TextSamples(self.mixture, self.samples, states),
                batch_size=None,
                num_workers=int(self._is_apart),
                prefetch_factor=_AHEAD if self._is_apart else None,
                collate_fn=_as_it_is,
                # The loader draws a seed, which must not be one of the training's numbers.
                generator=torch.Generator(),
            )
            self._iterators |= dict.fromkeys(numbers, iter(loader))

    def _states(self) -> dict[int, State]:
        return {number: pack_documents(state) for number, state in self._state_of.items()}

    def _load(self, stream: int, state: Mapping[str, Any]) -> int:
        found = unpack_documents(state)
        names, heads = found.get("names", ()), found.get("heads", ())
        # Sequential streams have a head for each corpus, buffered ones for each document.
        is_begun = np.array(found.get("positions", ()), dtype=bool)
        if len(heads) and "numbers" not in found:
            is_begun |= np.array(heads, dtype=bool)
        for name, begun in zip(names, is_begun, strict=True):
            if begun and name not in self.mixture.names:
                raise ValueError(f"the mixture does not name {name}, which it has read")
        if len(heads) > 2 * self.mixture.documents and "numbers" in found:
            raise ValueError("its buffer holds more documents than rsdb.documents allows")
        self._state_of[stream] = found
        return int(found["num_samples"])

    def _report_epochs(self, made: MadeSample) -> None:
        """Say that a corpus begins again in the first of this rank's streams."""
        turns = made.state["positions"] >> 32
        for name, turn, parts in zip(
            self.mixture.names, turns.tolist(), self.mixture.all_parts, strict=True
        ):
            epoch = (made.stream + turn * self.num_streams) // len(parts)
            if epoch > self._epochs.setdefault(name, 0):
                self._epochs[name] = epoch
                tell_once(f"> {name}: its documents are read for the {_ordinal(epoch + 1)} time")


def _ordinal(number: int) -> str:
    """A number as a word: ``21st``."""
    is_teen = number // 10 % 10 == 1
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _as_it_is[Item](item: Item) -> Item:
    return item
