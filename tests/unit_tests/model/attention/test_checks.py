"""Masks, configs and calls that the local attention refuses."""

from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from tests.unit_tests.model.attention.attention_cases import make_attention, make_inputs, pack
from trinity_megatron.model.attention.checks import check_causal_mask
from trinity_megatron.model.attention.segments import Segment


def test_causal_mask_is_accepted_and_checked_once() -> None:
    attention = make_attention(8)
    inputs = make_inputs(20, 2, 4, 2, 8)[:3]
    mask = torch.ones(20, 20).tril().expand(2, 1, 20, 20) < 0.5
    assert torch.equal(attention(*inputs, mask), attention(*inputs, None))
    mask.zero_()  # the object is known: no second comparison, which would be a synchronisation
    check_causal_mask(mask, [Segment(0, 20)], 20)


@pytest.mark.parametrize("shape", [(1, 1, 20, 20), (2, 1, 20, 20), (1, 1, 20, 21)])
def test_other_masks_are_refused(shape: tuple[int, ...]) -> None:
    attention = make_attention(8)
    mask = torch.ones(shape[-2:]).tril() < 0.5
    mask[10:, :10] = True  # a document boundary
    inputs = make_inputs(20, 2, 4, 2, 8)[:3]
    with pytest.raises(ValueError, match="--dataloader-inter-document-masking"):
        attention(*inputs, mask.expand(shape))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"config": {"attention_dropout": 0.1}}, "attention_dropout=0.1"),
        ({"config": {"softmax_type": "learnable"}}, "softmax_type='learnable'"),
        ({"config": {"log_max_attention_logit": True}}, "log_max_attention_logit=True"),
        ({"config": {"window_size": (7, 1)}}, "window_size=.7, 1."),
        ({"attn_mask_type": AttnMaskType.padding}, "attn_mask_type="),
    ],
)
def test_unsupported_requests_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        make_attention(8, **options)


def test_unsupported_calls_are_named() -> None:
    attention = make_attention(8)
    inputs = make_inputs(9, 1, 4, 2, 8)[:3]
    packed = pack([4, 5])
    flat = [tensor.squeeze(1) for tensor in inputs]
    with pytest.raises(ValueError, match="attention_bias"):
        attention(*inputs, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="attention_mask"):
        attention(*flat, torch.zeros(1, 1, 9, 9), packed_seq_params=packed)
    with pytest.raises(ValueError, match="KV cache"):
        attention(flat[0][-1:], *flat[1:], None, packed_seq_params=packed)
    with pytest.raises(ValueError, match="qkv_format='sbhd'"):
        attention(*inputs, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))
