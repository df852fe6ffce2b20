"""A permutation of any size that is evaluated at any place, without a table as long."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Up to this size a table is made, which all streams share.
_TABLE_SIZE = 2**16


def permute(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of ``0 .. size - 1`` sends places.

    Args:
        places: int64 ``[n]``, below ``size``.
        size: Of the permutation, from 1 on.
        key: Chooses the permutation, 64 bits.

    Returns:
        int64 ``[n]``.
    """
    if size <= _TABLE_SIZE:
        return _make_table(size, key)[places]
    return _walk(places, size, key)


@lru_cache(maxsize=32)
def _make_table(size: int, key: int) -> np.ndarray:
    """Sort random numbers."""
    start = _mix(np.array([key % 2**64], dtype=np.uint64))
    numbers = _mix(start + np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN)
    return np.argsort(numbers, kind="stable")


def _walk(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """A Feistel network over the next even number of bits.

    What falls outside goes through it again (cycle walking), so it is a permutation of the size.

    Source: Black, Rogaway: Ciphers with Arbitrary Finite Domains (2002).
    """
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    start = _mix(np.array([key % 2**64], dtype=np.uint64))
    keys = _mix(start + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: each bit of the input changes each of the output.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
