"""Inputs, gradients and comparisons that the tests of attention share."""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from trinity_megatron.model.attention.core_attention import (
    TrinityDotProductAttention,
)

# fp32 sums of some hundred products of unit normals: the errors seen are below 3e-6.
TOLERANCE = 1e-5
LOCAL, GLOBAL = 1, 4


def make_attention(
    window: int | None, *, layer_number: int = LOCAL, cp_group: Any = None, **options: Any
) -> TrinityDotProductAttention:
    fields = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": 4,
        **options.pop("config", {}),
    }
    mask_type = options.pop("attn_mask_type", AttnMaskType.causal)
    return TrinityDotProductAttention(
        config=TransformerConfig(**fields),
        layer_number=layer_number,
        attn_mask_type=mask_type,
        attention_type="self",
        pg_collection=SimpleNamespace(cp=cp_group, tp=None),
        **options,
    )


def make_inputs(
    num_queries: int, batch: int, heads: int, groups: int, size: int, num_keys: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(num_queries + heads)
    num_keys = num_queries if num_keys is None else num_keys
    shapes = (
        (num_queries, batch, heads, size),
        (num_keys, batch, groups, size),
        (num_keys, batch, groups, size),
        (num_queries, batch, heads * size),
    )
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def with_gradients(function: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of the first three tensors; the last is the gradient of the output."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    output = function(*inputs)
    output.backward(tensors[3].to(output.dtype))
    return [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[misc]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=TOLERANCE, rtol=TOLERANCE)


def pack(documents: list[int]) -> PackedSeqParams:
    boundaries = torch.tensor([0, *documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
