"""A prepared corpus among corpora of raw text: its documents are tokens already.

Streams take ranges of its documents in turn, as they take ranges of a file of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trinity_megatron.data.text.parts import IsWanted, Row, part_bytes


@dataclass(frozen=True)
class TokenCorpus:
    """A dataset of Megatron.

    Attributes:
        name: Of the corpus.
        key: That names it in errors.
        prefix: Of its files ``.bin`` and ``.idx``.
        documents: Number of its documents.
        num_bytes: Size of the tokens on the disk.
        content: Fingerprint of both files; empty before it is known.
    """

    name: str
    key: str
    prefix: Path
    documents: int
    num_bytes: int
    content: str = ""


class TokenParts:
    """Ranges of the documents of a prepared corpus.

    Args:
        corpus: The dataset.
        num_streams: Number of virtual streams, each of which needs some parts.
    """

    def __init__(self, corpus: TokenCorpus, num_streams: int) -> None:
        self.corpus = corpus
        wanted = -(-corpus.num_bytes // part_bytes(corpus.num_bytes, num_streams))
        self._count = min(max(wanted, num_streams), corpus.documents)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _dataset(self) -> Any:
        """Opened by the process that reads it."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(str(self.corpus.prefix), mmap=True)

    def path_of(self, part: int) -> Path:
        """The file that a part is in."""
        return Path(f"{self.corpus.prefix}.bin")

    def read(self, part: int, is_wanted: IsWanted) -> Iterator[Row]:
        """The documents of a part that are wanted.

        Args:
            part: Its number.
            is_wanted: Asked once for each row, in their order.
        """
        first, end = (self.corpus.documents * n // self._count for n in (part, part + 1))
        for row, document in enumerate(range(first, end)):
            if is_wanted(row):
                yield Row(row, np.array(self._dataset[document], dtype=np.int32))  # no view

    def take_notices(self) -> list[str]:
        """Nothing is left out."""
        return []
