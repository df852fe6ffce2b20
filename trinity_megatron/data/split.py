"""Which documents are held out for validation."""

import numpy as np

from trinity_megatron.errors import UserError

# Fewer tokens than a sequence or two make a validation loss meaningless.
MIN_SPLIT_TOKENS = 2048
# Four sequences of the longest preset (8192).  A small corpus keeps at least 90 % for training.
WANTED_VALIDATION_TOKENS = 4 * 8192
MAX_WANTED_SHARE = 0.1


def select_validation(
    keys: np.ndarray, sizes: np.ndarray, *, fraction: float, min_bytes: int, wanted_bytes: int = 0
) -> np.ndarray:
    """Choose the validation documents by their content alone.

    Documents with the lowest hashes go to validation: those below ``fraction`` of the range, and
    further ones while there are fewer than ``min_bytes`` bytes, or fewer than ``wanted_bytes`` and
    ``MAX_WANTED_SHARE`` of all. Equal documents stay together, and further documents in the corpus
    do not move one across, unless one of these binds.

    Args:
        keys: Hash of every document, uint64, ``[num_documents]``.
        sizes: Bytes of every document, ``[num_documents]``.
        fraction: Share of the distinct documents.
        min_bytes: Fewest bytes of validation text.
        wanted_bytes: Bytes of validation text that a corpus gives which is large enough.

    Returns:
        Whether each document is validation, bool, ``[num_documents]``.

    Raises:
        UserError: If no document would be left for training.
    """
    distinct, group = np.unique(keys, return_inverse=True)
    if len(distinct) < 2:
        raise UserError(
            f"sources hold {len(distinct)} distinct documents ({len(keys)} in all), which cannot "
            "be split into training and validation; add documents, or cut the text into several "
            "with --split-on"
        )
    cumulative = np.cumsum(np.bincount(group, weights=sizes))
    by_share = int(np.sum(distinct.astype(np.float64) < fraction * 2.0**64))
    by_bytes = int(np.searchsorted(cumulative, min_bytes)) + 1
    if by_bytes >= len(distinct):
        raise UserError(
            f"sources are too small: {len(distinct)} distinct documents with {int(cumulative[-1])} "
            f"bytes do not hold {MIN_SPLIT_TOKENS} tokens of validation and leave something to "
            "train on; add documents, or cut the text into several"
        )
    wanted = int(np.searchsorted(cumulative, wanted_bytes)) + 1 if wanted_bytes else 0
    most = int(np.searchsorted(cumulative, MAX_WANTED_SHARE * cumulative[-1], side="right"))
    return group < max(by_bytes, min(by_share, len(distinct) - 1), min(wanted, most))
