"""The loader of ``order: rsdb``: Megatron's external loader, whose state is in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from trinity_megatron.data.rsdb.document_buffer import Piece
from trinity_megatron.data.rsdb.virtual_stream import BufferedMixture, VirtualStream


class BufferedSamples(GPTDataset):
    """Megatron's samples from pieces of documents.

    A sample reads one token behind its last piece, for the last label; where that document has
    ended, the last token has no label.

    Args:
        datasets: Megatron's ``IndexedDataset`` of each corpus.
        config: Of the datasets.
    """

    def __init__(self, datasets: Sequence[Any], config: GPTDatasetConfig) -> None:
        self.datasets = datasets
        self._pieces: list[Piece] = []
        # Megatron's own reads its index here, which nothing else than the documents needs.
        super().__init__(None, None, np.zeros(0, np.int32), None, Split.train, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return []  # there is no index in the cache

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty

    def make(self, pieces: list[Piece]) -> dict[str, torch.Tensor]:
        """The sample of some pieces, as Megatron's datasets give it."""
        self._pieces = pieces
        return self[0]

    def _query_document_sample_shuffle_indices(
        self, idx: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        last = len(self._pieces) - 1
        parts = []
        for number, piece in enumerate(self._pieces):
            length = piece.length + (number == last and piece.rest > 0)
            dataset = self.datasets[piece.corpus]
            parts.append(dataset.get(piece.document, offset=piece.start, length=length))
        lengths = [len(part) for part in parts]
        if sum(lengths) == self.config.sequence_length:
            parts.append(np.array([self._pad_token_id]))
        documents = np.array([piece.document for piece in self._pieces], dtype=np.int64)
        return np.concatenate(parts, dtype=np.int64), documents, lengths


@dataclass(frozen=True)
class ReadingRank:
    """Which samples a data-parallel rank reads: Megatron's order of micro-batches.

    Attributes:
        rank: Number of the rank.
        size: Number of the ranks.
        micro_batch: Samples of a micro-batch.
    """

    rank: int
    size: int
    micro_batch: int

    def streams(self, consumed: int, num_streams: int) -> list[int]:
        """The virtual streams that this rank reads, from a sample of the run on.

        Args:
            consumed: Samples of the run so far.
            num_streams: A multiple of the samples that all ranks read at a time.
        """
        at_a_time = self.micro_batch * self.size
        first = consumed + self.rank * self.micro_batch
        return sorted(
            (first + turn * at_a_time + place) % num_streams
            for turn in range(num_streams // at_a_time)
            for place in range(self.micro_batch)
        )


class BufferLoader:
    """Micro-batches of a rank; an iterator with a state.

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
        self.mixture, self.samples, self.rank, self.consumed = mixture, samples, rank, consumed
        numbers = rank.streams(consumed, mixture.num_streams)
        self.streams = {number: VirtualStream(mixture, number) for number in numbers}
        for number, stream in self.streams.items():
            stream.num_samples = samples_before(consumed, number, mixture.num_streams)

    def __iter__(self) -> BufferLoader:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        first = self.consumed + self.rank.rank * self.rank.micro_batch
        made = []
        for sample in range(first, first + self.rank.micro_batch):
            stream = self.streams[sample % self.mixture.num_streams]
            made.append(self.samples.make(stream.next()))
        self.consumed += self.rank.micro_batch * self.rank.size
        batch = torch.utils.data.default_collate(made)
        if torch.cuda.is_available():
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return batch

    def save_state(self) -> dict[str, Any]:
        """What Megatron saves beside a checkpoint, a file for each data-parallel rank."""
        return {
            "consumed": self.consumed,
            "num_streams": self.mixture.num_streams,
            "documents": self.mixture.documents,
            "size": self.rank.size,
            "micro_batch": self.rank.micro_batch,
            "streams": {n: _to_tensors(stream.state()) for n, stream in self.streams.items()},
        }

    def load_streams(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on from the states of this rank's streams.

        Args:
            states: By number of the stream.

        Raises:
            ValueError: One does not fit the mixture, or is of another sample of the run.
        """
        for number, stream in self.streams.items():
            expected = stream.num_samples
            stream.load(_to_arrays(states[number]))
            if stream.num_samples != expected:
                raise ValueError(
                    f"stream {number} has made {stream.num_samples} sequences, not {expected}"
                )


def samples_before(consumed: int, stream: int, num_streams: int) -> int:
    """Samples of a stream among the first ``consumed`` of the run."""
    return (consumed - stream + num_streams - 1) // num_streams


def _to_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as tensors, which are loaded without unpickling code."""
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in state.items()
    }


def _to_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }
