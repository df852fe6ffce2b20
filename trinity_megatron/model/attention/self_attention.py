"""Megatron's self-attention, with a KV cache that it rotates once."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType

from trinity_megatron.model.attention.kv_cache import KeyValueCache


class TrinitySelfAttention(SelfAttention):
    """Megatron's, which rotates all keys of its static cache again for every token.

    With a :class:`.kv_cache.KeyValueCache` keys are rotated before they are kept, and a local layer
    keeps its window.  Everything else, and training, is Megatron's.
    """

    def _adjust_key_value_for_inference(  # type: ignore[override]
        self,
        inference_context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(inference_context, KeyValueCache):
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        start = inference_context.sequence_len_offset
        if rotary_pos_emb is not None:
            query, key = self._rotate(query, key, rotary_pos_emb, start)
        # Transformer Engine's attention has no such attribute and cuts the window itself.
        window = getattr(self.core_attention, "window", None)
        key, value = inference_context.append(self.layer_number, key, value, window=window)
        mask_type = AttnMaskType.no_mask if start else self.attn_mask_type
        return query, key, value, None, mask_type, None

    def _rotate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor],
        start: int,
    ) -> tuple[torch.Tensor, ...]:
        """Rotate queries and keys of the same positions in one call."""
        angles, of_keys = rotary_pos_emb
        assert angles is of_keys, "self-attention has one set of angles"
        rotated = apply_rotary_pos_emb(
            torch.cat([query, key], dim=2),
            angles[start : start + query.shape[0]],
            config=self.config,
            mscale=self._yarn_concentration_factor,
            cp_group=self.pg_collection.cp,
        )
        return rotated.split([query.shape[2], key.shape[2]], dim=2)
