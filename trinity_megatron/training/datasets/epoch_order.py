"""GPT datasets whose order does not depend on the length of the run.

Megatron shuffles the documents, and the samples, of all epochs of a run together, so a run with
more steps draws another order: after a resume with a larger ``--train-iters`` a part of the text is
read twice and another part not at all.  Here every epoch is shuffled by itself, so the order of
``n`` epochs is the beginning of the order of ``n + 1``.  The first epoch is Megatron's.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split

from trinity_megatron.errors import UserError


@dataclass
class EpochOrderConfig(GPTDatasetConfig):
    """Megatron's configuration, and what the datasets hold."""

    fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the content of each dataset, by its prefix."""

    refuse_long_conversations: bool = False
    """Whether conversations longer than a sequence are an error instead of being cut."""


class EpochOrderGPTDataset(GPTDataset):
    """A GPT dataset that shuffles each epoch by itself.

    Its cached index is named by the content of the data instead of their path.

    Args:
        indexed_dataset: Megatron's ``IndexedDataset``.
        dataset_path: Its prefix.
        indexed_indices: Documents of the split.
        num_samples: Samples to draw; None for one epoch.
        index_split: The split.
        config: The configuration.
    """

    is_shuffled = True

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: EpochOrderConfig,
    ) -> None:
        content = config.fingerprints.get(dataset_path or "", dataset_path)
        super().__init__(
            indexed_dataset, content, indexed_indices, num_samples, index_split, config
        )

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # The index does not depend on the tokenizer, which Megatron knows by its path.
        keys = GPTDataset._key_config_attributes()
        return [key for key in keys if key != "tokenizer"]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Write the index if it is not there, and let Megatron load it."""
        cache = self._cache_folder()
        if cache is None:
            return self._draw_index()
        config = self.config
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if is_first and not (config.fast_cache_load or config.defer_npy_index_mmap):
            # The names that Megatron looks for.
            base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
            names = ("document_index.npy", "sample_index.npy", "shuffle_index.npy")
            paths = [cache / f"{base}-{name}" for name in names]
            description = cache / f"{base}-description.txt"
            if not all(path.is_file() for path in (*paths, description)):
                cache.mkdir(parents=True, exist_ok=True)
                for path, array in zip(paths, self._draw_index(), strict=True):
                    _write(path, array)
                description.write_text(self.unique_description)
        return super()._build_document_sample_shuffle_indices()

    def _cache_folder(self) -> Path | None:
        if self.config.path_to_cache is not None:
            return Path(self.config.path_to_cache)
        if self.config.mock:
            return None
        return Path(self.dataset.path_prefix) / "cache" / f"{type(self).__name__}_indices"

    def _draw_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = self._get_num_tokens_per_epoch()
        return draw_index(
            self.indices,
            self.dataset.sequence_lengths,
            seq_length=self.config.sequence_length,
            num_epochs=self._get_num_epochs(tokens),
            seed=self.config.random_seed if self.is_shuffled else None,
            has_extra_token=self.config.add_extra_token_to_sequence,
        )


class FileOrderGPTDataset(EpochOrderGPTDataset):
    """A GPT dataset whose documents and samples are read in the order of the file."""

    is_shuffled = False


class EpochOrderMockGPTDataset(EpochOrderGPTDataset, MockGPTDataset):
    """Megatron's made-up data, shuffled in the same way."""


def draw_index(
    documents: np.ndarray,
    lengths: np.ndarray,
    *,
    seq_length: int,
    num_epochs: int,
    seed: int | None,
    has_extra_token: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw Megatron's document, sample and shuffle index, epoch by epoch.

    The documents of all epochs form one stream, which is cut into samples.  A sample belongs to the
    epoch in which it ends.

    Args:
        documents: int32 ``[num_documents]``: the documents of the split.
        lengths: int32: tokens of every document of the dataset.
        seq_length: Tokens of a sample.
        num_epochs: How often each document is read.
        seed: Of the run; None for the order of the file.
        has_extra_token: Whether a sample reaches one token into the next one, for its labels.

    Returns:
        Documents in the order of the stream, int32 ``[num_epochs * num_documents]``; the place in
        it where each sample begins, ``[num_samples + 1, 2]``; and the samples in the order in
        which they are read, ``[num_samples]``.

    Raises:
        UserError: A length is negative.
    """
    from megatron.core.datasets import helpers  # compiled code, which Megatron may have to build

    if len(lengths) and lengths.min() < 0:  # the compiled code would look for more documents
        raise UserError(
            f"an index (.idx) of the data says that a document has {lengths.min()} tokens. Remedy: "
            "prepare the data again, or take them from a source that you trust."
        )
    tokens = int(np.sum(lengths[documents]))
    ends = [(epoch * tokens - has_extra_token) // seq_length for epoch in range(num_epochs + 1)]
    ends[0] = 0
    stream = np.tile(documents.astype(np.int32, copy=False), num_epochs)
    # As Megatron: 32 bits where they are enough.
    is_small = ends[-1] < np.iinfo(np.uint32).max - 1
    shuffle = np.arange(ends[-1], dtype=np.uint32 if is_small else np.int64)
    if seed is not None:
        for epoch in range(num_epochs):
            # Megatron's generator in the first epoch, which draws documents, then samples.
            generator = np.random.RandomState([seed, epoch] if epoch else seed)
            generator.shuffle(stream[epoch * len(documents) : (epoch + 1) * len(documents)])
            generator.shuffle(shuffle[ends[epoch] : ends[epoch + 1]])
    if len(stream) * 2 > len(lengths):
        lengths = lengths.copy()  # read at once instead of page by page, in the order of the stream
    samples = helpers.build_sample_idx(
        lengths, stream, seq_length, num_epochs, tokens, True, has_extra_token
    )
    return stream, samples, shuffle


def check_is_long_enough(dataset: Any, num_samples: int) -> None:
    """Refuse a blend without weights that ends before the run does.

    Megatron repeats its datasets only where they have weights.

    Args:
        dataset: Of the training; None where this rank reads none.
        num_samples: Samples that the run asks for.

    Raises:
        UserError: Names both numbers and the remedy.
    """
    if dataset is not None and len(dataset) < num_samples:
        raise UserError(
            f"the run reads {num_samples} sequences, but its training data are a blend without "
            f"weights, which has {len(dataset)} and is not repeated. Remedy: a weight before each "
            "path, or fewer --train-iters."
        )


def _write(path: Path, array: np.ndarray) -> None:
    """Save an array so that its name stands for the whole of it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with draft.open("wb") as file:
        np.save(file, array)
    os.replace(draft, path)
