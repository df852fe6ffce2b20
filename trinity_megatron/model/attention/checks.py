"""Checks of what the local attention supports."""

from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.weak import WeakIdKeyDictionary

from trinity_megatron.errors import UserError
from trinity_megatron.model.attention.segments import Segment

# Tensors that were found to be causal masks: compared once per micro-batch for all layers.
_causal_masks = WeakIdKeyDictionary()


def check_causal_mask(
    attention_mask: torch.Tensor, segments: Sequence[Segment], num_keys: int
) -> None:
    """Check that a mask is the plain causal mask, once per tensor.

    Args:
        attention_mask: True for hidden keys, ``[1 or b, 1, sq, sk]``.
        segments: Positions of the queries.
        num_keys: sk.

    Raises:
        ValueError: The mask hides other keys.
    """
    if attention_mask in _causal_masks:
        return
    device = attention_mask.device
    positions = torch.cat(
        [torch.arange(s.position, s.position + s.num_queries, device=device) for s in segments]
    )
    hidden = torch.arange(num_keys, device=device) > positions[:, None]
    same_shape = attention_mask.shape[-2:] == hidden.shape
    if not (same_shape and bool((attention_mask.bool() == hidden).all())):
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} is not the plain causal mask, "
            "the only one that the local attention applies. Remedy: pass no mask "
            "(--no-create-attention-mask-in-dataloader); to keep documents apart, use "
            "--dataloader-inter-document-masking instead of --reset-attention-mask."
        )
    _causal_masks[attention_mask] = True


def check_supported(
    config: TransformerConfig, attn_mask_type: AttnMaskType, attention_type: str, dropout: float
) -> None:
    """Check that the local attention supports a config.

    Args:
        config: Megatron's config.
        attn_mask_type: Must be causal.
        attention_type: Must be ``"self"``.
        dropout: Must be 0.

    Raises:
        UserError: Names the field that is not supported.
        ValueError: The mask type is not causal.
    """
    asked = {
        "attention_dropout": (dropout, 0.0),
        "softmax_type": (config.softmax_type, "vanilla"),
        "qk_clip": (config.qk_clip, False),
        "log_max_attention_logit": (config.log_max_attention_logit, False),
        "attention_type": (attention_type, "self"),
    }
    for field, (value, supported) in asked.items():
        if value != supported:
            raise UserError(
                f"{field}={value!r} is not supported by the local attention. Remedy: "
                f"{field}={supported!r}, or --transformer-impl transformer_engine."
            )
    causal = (
        AttnMaskType.causal,
        AttnMaskType.padding_causal,
        AttnMaskType.causal_bottom_right,
    )
    if attn_mask_type not in causal:
        raise ValueError(
            f"attn_mask_type={attn_mask_type} is not causal. Remedy: AttnMaskType.causal."
        )


def check_packing(
    packed_seq_params: PackedSeqParams,
    attention_mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
) -> None:
    """Check that the local attention supports a call with packed documents.

    Args:
        packed_seq_params: Its format must be ``thd``.
        attention_mask: Must be None.
        query: ``[t, np, hn]``.
        key: ``[t, ng, hn]``: as many keys as queries.

    Raises:
        ValueError: An argument is not supported.
    """
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format={packed_seq_params.qkv_format!r} is not supported by "
            "the local attention. Remedy: 'thd'."
        )
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} was given together with "
            "packed_seq_params. Remedy: --no-create-attention-mask-in-dataloader; the document "
            "boundaries say it all."
        )
    if query.size(0) != key.size(0):
        raise ValueError(
            f"{query.size(0)} queries and {key.size(0)} keys: a KV cache cannot be combined with "
            "packed_seq_params. Remedy: pass none with a KV cache."
        )
