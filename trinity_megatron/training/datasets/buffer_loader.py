"""The loader of ``order: rsdb`` of indexed data, which works in the training's process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from trinity_megatron.data.rsdb.document_buffer import Piece
from trinity_megatron.data.rsdb.virtual_stream import BufferedMixture, VirtualStream
from trinity_megatron.training.datasets.stream_loader import (
    PackedSamples,
    ReadingRank,
    StreamLoader,
    samples_before,
)


class BufferedSamples(PackedSamples):
    """Samples from pieces of indexed documents.

    Args:
        datasets: Megatron's ``IndexedDataset`` of each corpus.
        config: Of the datasets.
    """

    def __init__(self, datasets: Sequence[Any], config: GPTDatasetConfig) -> None:
        self.datasets = datasets
        super().__init__(config)

    def make(self, pieces: list[Piece]) -> dict[str, torch.Tensor]:
        """The sample of some pieces, as Megatron's datasets give it."""
        last = len(pieces) - 1
        parts = []
        for number, piece in enumerate(pieces):
            length = piece.length + (number == last and piece.rest > 0)
            dataset = self.datasets[piece.corpus]
            parts.append(dataset.get(piece.document, offset=piece.start, length=length))
        return self.pack(parts, [piece.document for piece in pieces])


class BufferLoader(StreamLoader):
    """Samples of a rank from the buffers of its streams.

    Args:
        mixture: What all streams share.
        samples: Makes a sample of pieces.
        rank: Which samples are read.
        consumed: Samples of the run so far.
    """

    def __init__(
        self,
        mixture: BufferedMixture,
        samples: BufferedSamples,
        rank: ReadingRank,
        consumed: int,
    ) -> None:
        super().__init__(mixture.num_streams, rank, consumed)
        self.mixture, self.samples = mixture, samples
        self.streams = {number: VirtualStream(mixture, number) for number in self.numbers}
        for number, stream in self.streams.items():
            stream.num_samples = samples_before(consumed, number, mixture.num_streams)

    def _make(self, stream: int) -> dict[str, torch.Tensor]:
        return self.samples.make(self.streams[stream].next())

    def _states(self) -> dict[int, dict[str, Any]]:
        return {number: stream.state() for number, stream in self.streams.items()}

    def _load(self, stream: int, state: Mapping[str, Any]) -> int:
        self.streams[stream].load(state)
        return self.streams[stream].num_samples
