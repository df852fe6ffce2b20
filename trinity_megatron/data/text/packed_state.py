"""The documents of a buffer in few bytes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_NAMES = ("corpora", "numbers", "heads")
# What is kept of each document; its place is where it was in the buffer.
_DTYPES: tuple[np.dtype, ...] = (np.dtype("<u2"), np.dtype("<i8"), np.dtype("<u4"), np.dtype("<u4"))


def pack_documents(state: Mapping[str, Any]) -> dict[str, Any]:
    """Put the documents of a state in one array of bytes, about 3 for each document.

    Args:
        state: With ``corpora``, ``numbers`` and ``heads``, or without.
    """
    if "corpora" not in state:
        return dict(state)
    corpora, numbers, heads = (np.asarray(state[name]) for name in _NAMES)
    order = np.lexsort((numbers, corpora))
    # Sorted, the numbers grow by little.
    columns = (corpora[order], np.diff(numbers[order], prepend=0), heads[order], order)
    packed = [
        # The first bytes of all, then the second ones: most are the same.
        column.astype(dtype).view(np.uint8).reshape(-1, dtype.itemsize).T.tobytes()
        for column, dtype in zip(columns, _DTYPES, strict=True)
    ]
    content = zlib.compress(b"".join(packed), 9)
    others = {name: value for name, value in state.items() if name not in _NAMES}
    return {**others, "documents": np.frombuffer(content, np.uint8).copy()}


def unpack_documents(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`pack_documents`.

    Raises:
        ValueError: The bytes are damaged.
    """
    if "documents" not in state:
        return dict(state)
    try:
        content = zlib.decompress(np.asarray(state["documents"]).tobytes())
    except zlib.error as error:
        raise ValueError(f"the documents of a buffer are damaged ({error})") from error
    count = len(content) // sum(dtype.itemsize for dtype in _DTYPES)
    columns, start = [], 0
    for dtype in _DTYPES:
        size = count * dtype.itemsize
        planes = np.frombuffer(content, np.uint8, size, start).reshape(dtype.itemsize, count)
        columns.append(np.ascontiguousarray(planes.T).view(dtype).reshape(count))
        start += size
    corpora, steps, heads, order = columns
    sorted_columns: tuple[np.ndarray, ...] = (
        corpora.astype(np.int32),
        np.cumsum(steps),
        heads.astype(np.int64),
    )
    back = np.argsort(order)
    others = {name: value for name, value in state.items() if name != "documents"}
    found = zip(_NAMES, sorted_columns, strict=True)
    return {**others, **{name: column[back] for name, column in found}}
