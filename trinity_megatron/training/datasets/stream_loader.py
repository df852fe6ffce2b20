"""A loader whose samples are made by virtual streams: Megatron's external loader.

Which rank reads a stream follows from the number of the sample; the state of each stream is in the
checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split


class PackedSamples(GPTDataset):
    """Megatron's samples from pieces of documents.

    A sample has one token behind its last piece, for the last label; where that document has
    ended, the last token has no label.

    Args:
        config: Of the datasets.
    """

    def __init__(self, config: GPTDatasetConfig) -> None:
        self._parts: list[np.ndarray] = []
        self._documents: Sequence[int] = ()
        # Megatron's own reads its index here, which nothing else than the documents needs.
        super().__init__(None, None, np.zeros(0, np.int32), None, Split.train, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return []  # there is no index in the cache

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty

    def pack(self, parts: list[np.ndarray], documents: Sequence[int]) -> dict[str, torch.Tensor]:
        """A sample as Megatron's datasets give it.

        Args:
            parts: Tokens of each piece; of the last one with the token behind it, if any.
            documents: Number of the document of each piece.
        """
        self._parts, self._documents = parts, documents
        return self[0]

    def _query_document_sample_shuffle_indices(
        self, idx: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        parts = list(self._parts)
        lengths = [len(part) for part in parts]
        if sum(lengths) == self.config.sequence_length:
            parts.append(np.array([self._pad_token_id]))
        documents = np.array(self._documents, dtype=np.int64)
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

    @property
    def at_a_time(self) -> int:
        """Samples of a micro-batch of all ranks."""
        return self.micro_batch * self.size

    def streams(self, consumed: int, num_streams: int) -> list[int]:
        """The virtual streams that this rank reads, in turn, from a sample of the run on.

        Args:
            consumed: Samples of the run so far.
            num_streams: A multiple of the samples that all ranks read at a time.
        """
        first = consumed + self.rank * self.micro_batch
        return [
            (first + turn * self.at_a_time + place) % num_streams
            for turn in range(num_streams // self.at_a_time)
            for place in range(self.micro_batch)
        ]


class StreamLoader(ABC):
    """Micro-batches of a rank; an iterator with a state.

    Args:
        num_streams: Number of virtual streams.
        rank: Which samples are read.
        consumed: Samples of the run so far.
    """

    def __init__(self, num_streams: int, rank: ReadingRank, consumed: int) -> None:
        self.num_streams, self.rank, self.consumed = num_streams, rank, consumed
        # Streams of this rank, in the order of its samples.
        self.numbers = rank.streams(consumed, num_streams)

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        first = self.consumed + self.rank.rank * self.rank.micro_batch
        samples = range(first, first + self.rank.micro_batch)
        made = [self._make(sample % self.num_streams) for sample in samples]
        self.consumed += self.rank.at_a_time
        batch = torch.utils.data.default_collate(made)
        if torch.cuda.is_available():
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return batch

    @abstractmethod
    def _make(self, stream: int) -> dict[str, torch.Tensor]:
        """The next sample of a stream."""

    @abstractmethod
    def _states(self) -> dict[int, dict[str, Any]]:
        """What a resume needs of each stream."""

    @abstractmethod
    def _load(self, stream: int, state: Mapping[str, Any]) -> int:
        """Go on from the state of a stream; returns the samples that it has made."""

    def save_state(self) -> dict[str, Any]:
        """What Megatron saves beside a checkpoint, a file for each data-parallel rank."""
        return {
            "consumed": self.consumed,
            "num_streams": self.num_streams,
            "size": self.rank.size,
            "micro_batch": self.rank.micro_batch,
            "streams": {n: _to_tensors(state) for n, state in self._states().items()},
        }

    def load_streams(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on from the states of this rank's streams.

        Args:
            states: By number of the stream.

        Raises:
            ValueError: One does not fit the mixture, or is of another sample of the run.
        """
        for number in self.numbers:
            expected = samples_before(self.consumed, number, self.num_streams)
            made = self._load(number, _to_arrays(states[number]))
            if made != expected:
                raise ValueError(f"stream {number} has made {made} sequences, not {expected}")


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
