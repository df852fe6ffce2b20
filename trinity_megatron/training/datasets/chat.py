"""Conversations packed into sequences: what ``prepare-data --chat`` wrote, for ``pretrain()``.

The samples are those of ``--dataloader-inter-document-masking``: a conversation sees no other one.
Each epoch has an order of its own, is packed by itself and ends with padding, so the samples of
``n`` epochs are the first of those of ``n + 1``: a longer run, and a resume, read the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_idx_path
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from trinity_megatron.data.chat.prepare import ASSISTANT
from trinity_megatron.data.index_file import HEADER
from trinity_megatron.errors import UserError
from trinity_megatron.process.screen import tell_once
from trinity_megatron.training.datasets.epoch_order import EpochOrderConfig


class ChatDataset(MegatronDataset):
    """Conversations in sequences of ``config.sequence_length`` tokens.

    A conversation of n tokens takes n - 1 positions: its last token is only a label.  One that is
    longer than a sequence is cut, or refused; one of whose labels the assistant then says none is
    left out.

    Args:
        dataset: Megatron's ``IndexedDataset`` with modes.
        dataset_path: Its prefix.
        indices: Conversations of the split.
        num_samples: Samples to draw; None for one epoch.
        index_split: The split.
        config: The configuration.

    Raises:
        UserError: A conversation is longer than a sequence and may not be cut, or none is left.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: EpochOrderConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self._firsts = np.asarray(dataset.document_indices)
        self._kept, sizes = self._choose()
        self._order, self._ends = pack_epochs(
            sizes,
            config.sequence_length,
            num_samples=num_samples,
            seed=config.random_seed,
        )

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Number of conversations."""
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: EpochOrderConfig) -> IndexedDataset:
        """Open the files with the modes of their sequences."""
        return IndexedDataset(dataset_path, multimodal=True, mmap=config.mmap_bin_files)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._ends)

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """A sample.

        Args:
            index: Its number; None for one without loss.

        Returns:
            ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (fp32), each ``[s]``;
            ``cu_seqlens``, int32 ``[s + 1]``, filled up with s; ``max_seqlen``, int32.
        """
        length = self.config.sequence_length
        tokens, labels = np.zeros(length, np.int64), np.zeros(length, np.int64)
        positions, mask = np.zeros(length, np.int64), np.zeros(length, np.float32)
        boundaries, number = [0], index or 0
        start = int(self._ends[number - 1]) if number else 0
        for place in self._order[start : int(self._ends[number])]:
            text, is_learnt = self._read(int(self._kept[place]))
            begin = boundaries[-1]
            end = begin + len(text) - 1
            tokens[begin:end], labels[begin:end] = text[:-1], text[1:]
            positions[begin:end], mask[begin:end] = np.arange(end - begin), is_learnt[1:]
            boundaries.append(end)
        padding = length - boundaries[-1]
        positions[boundaries[-1] :] = np.arange(padding)
        documents = np.full(length + 1, length, np.int32)
        documents[: len(boundaries)] = boundaries
        if index is None:
            mask[:] = 0.0
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.from_numpy(positions),
            "cu_seqlens": torch.from_numpy(documents),
            "max_seqlen": torch.tensor(
                int(np.diff([*boundaries, length]).max()), dtype=torch.int32
            ),
        }

    def _read(self, conversation: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that fit into a sequence, and which of them the assistant says."""
        runs = slice(self._firsts[conversation], self._firsts[conversation + 1])
        sequences, modes = self.dataset[int(runs.start) : int(runs.stop)]
        text = np.concatenate(sequences)
        lengths = [len(sequence) for sequence in sequences]
        is_learnt = np.repeat(np.asarray(modes) == ASSISTANT, lengths)
        return text[: self.config.sequence_length + 1], is_learnt[: self.config.sequence_length + 1]

    def _choose(self) -> tuple[np.ndarray, np.ndarray]:
        """Conversations that are read, and the positions that each takes; says what is cut."""
        length, index = self.config.sequence_length, self.dataset.index
        ends = np.cumsum(np.concatenate([[0], index.sequence_lengths]), dtype=np.int64)
        starts = ends[self._firsts[self.indices]]
        sizes = ends[self._firsts[self.indices + 1]] - starts
        long = sizes > length + 1
        where = f"{self.index_split.name}: {int(long.sum())} of {len(sizes)} conversations"
        if long.any() and self.config.refuse_long_conversations:
            raise UserError(
                f"{where} are longer than --seq-length {length}, the longest has {int(sizes.max())}"
                " tokens. Remedy: a longer --seq-length, or cut them (without "
                "--refuse-long-conversations)."
            )
        has_loss = self._first_labels() - starts <= length
        if long.any():
            tell_once(
                f"> {where} are longer than --seq-length {length} and are cut: "
                f"{int((sizes - length - 1)[long].sum())} of {int(sizes.sum())} tokens; "
                f"{int((~has_loss).sum())} have no answer before the cut and are left out"
            )
        if not has_loss.any():
            raise UserError(
                f"{where} are cut before their first answer at --seq-length {length}, and nothing "
                "is left. Remedy: a longer --seq-length."
            )
        return self.indices[has_loss], np.minimum(sizes - 1, length)[has_loss]

    def _first_labels(self) -> np.ndarray:
        """Where in the file the assistant says its first token that can be a label."""
        index = self.dataset.index
        starts = np.cumsum(np.concatenate([[0], index.sequence_lengths]), dtype=np.int64)
        runs = np.flatnonzero(np.asarray(index.sequence_modes) == ASSISTANT)
        first = np.searchsorted(runs, self._firsts[self.indices])
        found = starts[runs[np.minimum(first, len(runs) - 1)]]
        begins = starts[self._firsts[self.indices]]
        # The first token of a conversation is no label.
        return np.maximum(found, begins + 1)


def pack_epochs(
    sizes: np.ndarray, length: int, *, num_samples: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle and pack conversations, epoch by epoch, until there are enough samples.

    Greedy: a sample takes the next conversation as long as it fits, and is filled up with padding.

    Args:
        sizes: Positions that each conversation takes, ``[n]``, none more than ``length``.
        length: Positions of a sample.
        num_samples: Fewest samples; None for one epoch.
        seed: Of the run.

    Returns:
        Conversations in the order in which they are read, int64; and for each sample where in that
        order it ends, int64 ``[num_samples]``.
    """
    orders: list[np.ndarray] = []
    ends: list[int] = []
    epoch = packed = 0
    while epoch == 0 or (num_samples is not None and len(ends) < num_samples):
        generator = np.random.RandomState([seed, epoch] if epoch else seed)
        order = generator.permutation(len(sizes))
        ends += [packed + end for end in pack(sizes[order], length)]
        orders.append(order)
        packed, epoch = packed + len(order), epoch + 1
    if num_samples is not None:
        ends = ends[:num_samples]
    return np.concatenate(orders), np.array(ends, np.int64)


def pack(sizes: np.ndarray, length: int) -> list[int]:
    """Pack items one after another into boxes.

    Args:
        sizes: Of the items, ``[n]``.
        length: Size of a box.

    Returns:
        For each box the number of items up to its end.
    """
    totals = np.cumsum(sizes, dtype=np.int64)
    ends: list[int] = []
    before = 0
    while not ends or ends[-1] < len(sizes):
        end = int(np.searchsorted(totals, before + length, side="right"))
        ends.append(end)
        before = int(totals[end - 1])
    return ends


def has_modes(prefix: str) -> bool:
    """Whether an indexed dataset is one of conversations: its index has the mode of each sequence.

    Args:
        prefix: Path without ``.bin`` and ``.idx``.

    Source: megatron.core.datasets.indexed_dataset, _IndexWriter.
    """
    path = Path(get_idx_path(prefix))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return False
    *_, sequences, documents = HEADER.unpack(header)
    return os.path.getsize(path) == HEADER.size + sequences * (4 + 8 + 1) + documents * 8
