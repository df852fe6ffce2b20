"""Segments of documents."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from tests.unit_tests.model.attention.attention_cases import pack
from trinity_megatron.model.attention.segments import Segment, document_segments


def test_document_segments() -> None:
    packed = pack([3, 0, 4])
    segments = document_segments(packed, 9)
    assert segments == [Segment(0, 3, 0), Segment(3, 4, 3), Segment(7, 2, 7)]
    assert document_segments(packed, 9) is segments  # read once
    packed.cu_seqlens_q_padded = torch.tensor([0, 4, 9], dtype=torch.int32)
    assert document_segments(packed, 9) == [Segment(0, 4, 0), Segment(4, 5, 4)]


@pytest.mark.parametrize("boundaries", [[1, 9], [0, 5, 4, 9], [0, 10]])
def test_boundaries_that_are_none(boundaries: list[int]) -> None:
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(boundaries))
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        document_segments(packed, 9)
