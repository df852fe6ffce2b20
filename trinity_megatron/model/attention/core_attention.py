"""Megatron's ``core_attention`` of local and global layers, without Transformer Engine.

Three implementations give the same result.  On a CPU, :mod:`.blocked` computes everything.  On a
GPU, plain causal attention runs in torch's flash attention, and windows, documents and context
parallelism in FlexAttention (:mod:`.flex`), or in blocks if FlexAttention cannot be compiled.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.nn.attention.flex_attention import BlockMask

from trinity_megatron.errors import UserError
from trinity_megatron.model.attention.blocked import blocked_attention
from trinity_megatron.model.attention.checks import (
    check_causal_mask,
    check_packing,
    check_supported,
)
from trinity_megatron.model.attention.context_parallel import (
    rank_segments,
    share_keys_and_values,
)
from trinity_megatron.model.attention.flex import (
    fused_attention,
    has_fused_attention,
    key_ranges,
    range_block_mask,
)
from trinity_megatron.model.attention.segments import Segment, document_segments
from trinity_megatron.model.attention.zigzag import ZigzagCut
from trinity_megatron.telemetry.step_statistics import statistics_of

# Queries per block.  CPU: of 32, 64, 128 and 256, 64 was the fastest or within 7% of it for windows
# of 128 to 512, head sizes of 32 and 128, batch sizes of 1 and 8.  CUDA: not measured.
_BLOCK_ROWS = {"cpu": 64}
_BLOCK_ROWS_OF_ACCELERATORS = 512


class TrinityDotProductAttention(MegatronModule):
    """Megatron's ``core_attention`` of a local or a global layer, without Transformer Engine.

    Megatron's ``is_layer_window_attention`` determines which layers are local, e.g. with
    ``window_attn_skip_freq=4`` all but every fourth.  A local layer has a window of
    ``config.window_size[0] + 1`` keys.  Attention is always causal.  If there are fewer queries
    than keys (a KV cache), the queries are the last positions.

    Args:
        config: Megatron's config.
        layer_number: Number of the layer in the model, from 1.
        attn_mask_type: Must be causal.
        attention_type: ``"self"``.
        attention_dropout: None or 0.
        softmax_scale: Factor of the scores; None for 1 / sqrt(hn).
        cp_comm_type: None, ``"p2p"`` (Megatron's default) or ``"all_gather"``.  Whatever it is,
            local layers exchange their window, and global layers gather the sequence.
        pg_collection: Its ``cp`` is the context-parallel group.
        **kwargs: Keyword arguments of later Megatron versions.

    Raises:
        UserError: Names the config field that is not supported.
        ValueError: The mask type is not causal.

    Source: report section 2.1, eq 1-14.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group = pg_collection.cp
        self.cp_size = get_pg_size(self.cp_group)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        check_supported(config, attn_mask_type, attention_type, dropout)
        if self.cp_size > 1 and cp_comm_type not in (None, "p2p", "all_gather"):
            raise UserError(
                f"cp_comm_type={cp_comm_type!r} is not available in the local attention. "
                "Remedy: --cp-comm-type all_gather, or --transformer-impl transformer_engine."
            )
        self.layer_number = layer_number
        self.window = _window_of_layer(config, layer_number)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Compute attention.

        Args:
            query: ``[sq, b, np, hn]``, or ``[t, np, hn]`` with packed documents.
            key: ``[sk, b, ng, hn]`` or ``[t, ng, hn]``.
            value: Same shape as ``key``.
            attention_mask: None, or the plain causal mask ``[1 or b, 1, sq, sk]``.
            attn_mask_type: Not used; with a KV cache Megatron passes ``no_mask``.
            attention_bias: Must be None.
            packed_seq_params: Document boundaries, in format ``thd``.

        Returns:
            ``[sq, b, np * hn]`` or ``[t, np * hn]``.

        Raises:
            ValueError: The mask is not causal, or an argument is not supported.
        """
        if attention_bias is not None:
            raise ValueError(
                "attention_bias is not supported by the local attention. Remedy: pass None."
            )
        if packed_seq_params is not None:
            return self._attend_to_documents(query, key, value, attention_mask, packed_seq_params)
        num_keys = key.size(0) * self.cp_size
        whole = (Segment(num_keys - query.size(0) * self.cp_size, query.size(0) * self.cp_size),)
        assert whole[0].position >= 0, "there is a key for every query"
        if attention_mask is not None:
            check_causal_mask(attention_mask, self._segments(whole, num_keys, None), num_keys)
        if self.cp_size > 1:
            key, value = share_keys_and_values(key, value, self.window, self.cp_group)
        return self._attend(query, key, value, self._segments(whole, num_keys, self.window))

    def _segments(
        self, documents: tuple[Segment, ...], num_tokens: int, window: int | None
    ) -> Sequence[Segment]:
        """Segments of this rank's queries; see :func:`.context_parallel.rank_segments`."""
        if self.cp_size == 1:
            return documents
        cut = ZigzagCut(num_tokens, self.cp_size)
        return rank_segments(documents, cut, get_pg_rank(self.cp_group), window)

    def _attend_to_documents(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams,
    ) -> torch.Tensor:
        check_packing(packed_seq_params, attention_mask, query, key)
        num_tokens = query.size(0) * self.cp_size
        documents = tuple(document_segments(packed_seq_params, num_tokens))
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        if self.cp_size > 1:
            key, value = share_keys_and_values(key, value, self.window, self.cp_group)
        segments = self._segments(documents, num_tokens, self.window)
        return self._attend(query, key, value, segments).squeeze(1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Sequence[Segment],
    ) -> torch.Tensor:
        scale = query.size(-1) ** -0.5 if self.softmax_scale is None else self.softmax_scale
        num_keys = key.size(0)
        window = None if self.window is None or self.window >= num_keys else self.window
        is_training = self.training and torch.is_grad_enabled()
        if is_training and (statistics := statistics_of(self.config)).is_collecting:
            group = self.cp_group if self.cp_size > 1 else None
            statistics.observe(
                "attention/logit_bound",
                layer=self.layer_number,
                count=0,
                total=0,
                maximum=logit_bound(query.detach(), key.detach(), scale=scale, group=group),
            )
        if window is None and query.size(0) == 1:
            return attention_of_one(query, key, value, scale=scale)
        if query.is_cuda and window is None and list(segments) == [Segment(0, num_keys)]:
            return causal_attention(query, key, value, scale=scale)
        if has_fused_attention(query):
            block_mask = _block_mask(tuple(segments), num_keys, window, query.device)
            return fused_attention(query, key, value, block_mask, scale=scale)
        return blocked_attention(
            query,
            key,
            value,
            segments,
            window=window,
            scale=scale,
            block_rows=_BLOCK_ROWS.get(query.device.type, _BLOCK_ROWS_OF_ACCELERATORS),
        )


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Plain causal attention in one call without a mask, for CUDA's flash kernels.

    Args:
        query: ``[s, b, np, hn]``.
        key: ``[s, b, ng, hn]``.
        value: ``[s, b, ng, hn]``.
        scale: Factor of the scores.

    Returns:
        ``[s, b, np * hn]``.
    """
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )
    return output.permute(2, 0, 1, 3).flatten(2)


def attention_of_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Attention of the last position to all: a step with a KV cache needs no mask.

    Args:
        query: ``[1, b, np, hn]``.
        key: ``[s, b, ng, hn]``.
        value: ``[s, b, ng, hn]``.
        scale: Factor of the scores.

    Returns:
        ``[1, b, np * hn]``.
    """
    # The query heads of a group become rows, see blocked.py.
    heads = query.squeeze(0).unflatten(1, (key.size(2), -1))  # [b, ng, np / ng, hn]
    key, value = (tensor.permute(1, 2, 0, 3) for tensor in (key, value))
    return F.scaled_dot_product_attention(heads, key, value, scale=scale).flatten(1).unsqueeze(0)


def logit_bound(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Upper bound of the attention logits of a layer, without computing the logits.

    ``scale * max |q| * max |k|`` for each head (Cauchy-Schwarz).  With QK-norm all vectors have
    about the same norm, and the bound is close.

    Args:
        query: ``[sq, b, np, hn]``.
        key: ``[sk, b, ng, hn]``; ng divides np.
        scale: Factor of the scores.
        group: Context-parallel group, whose ranks have keys and queries of the same sequences.

    Returns:
        Scalar, fp32.
    """
    longest_query, longest_key = (
        torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32).amax(dim=0)
        for vectors in (query, key)
    )
    if group is not None:  # the bound must not depend on the layout
        for longest in (longest_query, longest_key):
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=group)
    by_group = longest_query.unflatten(-1, (key.size(2), -1))  # [b, ng, np / ng]
    return scale * (by_group * longest_key.unsqueeze(-1)).max()


# A step needs two masks, for local and global layers.  With packed documents, every micro-batch has
# its own.
@functools.lru_cache(maxsize=8)
def _block_mask(
    segments: tuple[Segment, ...], num_keys: int, window: int | None, device: torch.device
) -> BlockMask:
    with torch.inference_mode(False):
        return range_block_mask(key_ranges(segments, window=window, device=device), num_keys)


def _window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """Number of keys that a query of the layer attends to, its own included; None if global."""
    size, skip = config.window_size, config.window_attn_skip_freq
    if not size or not is_layer_window_attention(size, skip, layer_number):  # type: ignore[arg-type]
        return None
    before, after = size
    if before < 0:  # no limit
        return None
    if after != 0:
        raise UserError(
            f"window_size={size} lets a token see later ones. Remedy: ({before}, 0), a window of "
            f"{before + 1} keys."
        )
    return before + 1
