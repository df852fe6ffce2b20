"""The sequences of a mixture, one after the other, from the documents: slow and by itself.

Nothing of the package or of Megatron is asked; the files are read by their layout.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

_DTYPES = {4: np.int32, 8: np.uint16}


def read_documents(prefix: Path) -> list[np.ndarray]:
    """The documents of a dataset in Megatron's format."""
    index = Path(f"{prefix}.idx").read_bytes()
    _, _, code, count, _ = struct.unpack("<9sQBQQ", index[:34])
    lengths = np.frombuffer(index, np.int32, count, 34)
    tokens = np.fromfile(f"{prefix}.bin", _DTYPES[code]).astype(np.int64)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def corpus_samples(
    documents: Sequence[np.ndarray], seq_length: int, seed: int, epochs: int
) -> list[np.ndarray]:
    """The samples of a corpus in the order in which they are read, each ``[seq_length + 1]``."""
    parts, orders = [], []
    begin = 0
    for epoch in range(epochs):
        generator = np.random.RandomState([seed, epoch] if epoch else seed)
        order = np.arange(len(documents), dtype=np.int32)
        generator.shuffle(order)
        parts += [documents[index] for index in order]
        # A sample is of the epoch of its last token, which is the first of the next sample.
        end = (sum(map(len, parts)) - 1) // seq_length
        shuffled = np.arange(begin, end, dtype=np.uint32)
        generator.shuffle(shuffled)
        orders.append(shuffled)
        begin = end
    stream = np.concatenate(parts)
    return [
        stream[number * seq_length : (number + 1) * seq_length + 1]
        for number in np.concatenate(orders).astype(int)
    ]


def turns(parts: dict[str, int], seed: int, phase: int) -> Iterator[str]:
    """The corpora of a phase, sample by sample; ``parts`` are whole numbers without a factor."""
    names = sorted(parts)
    repeats = -(-4096 // sum(parts.values()))
    block = repeats * sum(parts.values())
    bits = iter(np.random.Philox(key=[seed, phase]).random_raw(block).tolist())
    places = []
    for number, name in enumerate(names):
        count = repeats * parts[name]
        for stratum in range(count):
            at = Fraction(stratum * 2**20 + (next(bits) >> 44)) * block / count
            places.append((at.numerator // at.denominator, number))
    order = [names[number] for _, number in sorted(places)]
    while True:
        yield from order


def mixture_samples(
    corpora: dict[str, Sequence[np.ndarray]],
    phases: Sequence[tuple[int, dict[str, int]]],
    *,
    seq_length: int,
    seed: int,
    samples: int,
    epochs: int,
) -> list[np.ndarray]:
    """The samples of a run.

    Args:
        corpora: Documents by name.
        phases: Consumed tokens at the end of each, and its parts.
        seq_length: Tokens of a sample.
        seed: Of the run.
        samples: Of the run.
        epochs: At least as many as any corpus is read.
    """
    streams = {
        name: iter(corpus_samples(documents, seq_length, seed, epochs))
        for name, documents in corpora.items()
    }
    found: list[np.ndarray] = []
    for number, (end, parts) in enumerate(phases):
        of_phase = turns(parts, seed, number)
        while len(found) < samples and len(found) * seq_length < end:
            found.append(next(streams[next(of_phase)]))
    return found
