"""Small datasets in Megatron's format."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_dataset(prefix: Path, lengths: Sequence[int], first: int = 1) -> Path:
    """Write documents of the given lengths, in which no token comes twice.

    Args:
        prefix: Of the files ``.bin`` and ``.idx``.
        lengths: Tokens of each document.
        first: The first token; the others count on from it.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in lengths:
        builder.add_document(torch.arange(first, first + length), [length])
        first += length
    builder.finalize(f"{prefix}.idx")
    return prefix
