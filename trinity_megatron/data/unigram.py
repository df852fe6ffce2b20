"""Entropy of token frequencies."""

from collections.abc import Sequence

import numpy as np


def unigram_entropy(counts: Sequence[int] | np.ndarray) -> float:
    """Entropy of token frequencies in nats per token, ``-sum(p log p)`` with ``p = counts / sum``.

    Args:
        counts: Number of occurrences of each token, ``[vocab_size]``.

    Raises:
        ValueError: A count is negative, or none is positive.
    """
    values = np.asarray(counts, dtype=np.float64)
    if values.size == 0 or values.min() < 0 or values.sum() <= 0:
        raise ValueError("counts must be non-negative with a positive sum; count some tokens first")
    shares = values[values > 0] / values.sum()
    return float(max(0.0, -np.sum(shares * np.log(shares))))
