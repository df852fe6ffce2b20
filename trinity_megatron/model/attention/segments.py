"""Segments: runs of consecutive queries of one document."""

from typing import NamedTuple

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Segments by PackedSeqParams, with the boundaries they were read from.  The boundaries are read on
# the host once per micro-batch for all layers.
_document_segments = WeakIdKeyDictionary()


class Segment(NamedTuple):
    """Consecutive queries of one document.

    Attributes:
        position: Position of the first query among the keys.
        num_queries: Number of queries.
        first_key: First key of the document.
    """

    position: int
    num_queries: int
    first_key: int = 0


def note_boundaries(
    packed_seq_params: PackedSeqParams, boundaries: list[int], num_tokens: int
) -> None:
    """Say what the boundaries of a packed sequence are, where the host knows them.

    Args:
        packed_seq_params: As :func:`document_segments` will get it.
        boundaries: Of the documents, ``[num_documents + 1]``.
        num_tokens: Length of the sequence.

    Raises:
        ValueError: As in :func:`document_segments`.
    """
    segments = _segments_between(boundaries, num_tokens)
    tensor = _boundaries(packed_seq_params)
    _document_segments[packed_seq_params] = (tensor, num_tokens, segments)


def document_segments(packed_seq_params: PackedSeqParams, num_tokens: int) -> list[Segment]:
    """Segments of the documents in a packed sequence; read once per ``PackedSeqParams``.

    The boundaries are read on the host, unless :func:`note_boundaries` has said them.

    Args:
        packed_seq_params: Its ``cu_seqlens_q_padded`` is used if set, else its ``cu_seqlens_q``
            (int32 ``[num_documents + 1]``).  The padding of a document follows its tokens, which do
            not attend to it.
        num_tokens: Length of the sequence.  Tokens after the last boundary are one more document.

    Raises:
        ValueError: The boundaries do not start at 0, decrease, or exceed the sequence.
    """
    boundaries = _boundaries(packed_seq_params)
    known = _document_segments.get(packed_seq_params)
    if known is None or known[0] is not boundaries or known[1] != num_tokens:
        segments = _segments_between(boundaries.flatten().tolist(), num_tokens)
        known = _document_segments[packed_seq_params] = (boundaries, num_tokens, segments)
    return known[2]


def _boundaries(packed_seq_params: PackedSeqParams) -> Tensor:
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def _segments_between(boundaries: list[int], num_tokens: int) -> list[Segment]:
    rising = all(a <= b for a, b in zip(boundaries, boundaries[1:], strict=False))
    if boundaries[0] != 0 or not rising or boundaries[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens_q={boundaries} does not cut a row of {num_tokens} tokens into documents. "
            "Remedy: start at 0, do not decrease, and end at the number of tokens."
        )
    ends = [*boundaries[1:], num_tokens]
    pairs = zip(boundaries, ends, strict=True)
    return [Segment(start, end - start, start) for start, end in pairs if end > start]
