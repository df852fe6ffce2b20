"""Causal attention with a window, documents, context parallelism: the core of ``local`` layers.

Everything is one computation.  The queries are cut into blocks of consecutive rows, and a block
attends to exactly the keys its rows may see: the window, back to the start of the document.  So the
work of a local layer grows with sequence x window, a document needs no mask of its own, a chunk of
a context-parallel rank is a block that starts later, and so is the last token of a KV cache.

All blocks of a layer share one mask of the shape of a single block.  Compared with one causal call
over all keys, this is 2.8 times as fast on a CPU for a window of a quarter of the sequence, and 1.6
times for a global layer, because torch's CPU kernel skips masked keys only in steps of 512.  On a
GPU the same is one kernel: plain causal attention in flash attention, everything else in
FlexAttention (``flex_attention.py``); the blocks serve where that cannot be compiled.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.weak import WeakIdKeyDictionary

from trinity_megatron.errors import UserError
from trinity_megatron.model.attention.flex import (
    fused_attention,
    has_fused_attention,
    key_ranges,
    range_block_mask,
)
from trinity_megatron.telemetry.step_statistics import STATISTICS

# Rows of a block.  CPU: 64 was the fastest, or within 7% of it, of 32, 64, 128 and 256 for windows
# of 128 to 512, head sizes 32 and 128, batch sizes 1 and 8.  CUDA: not measured.
_BLOCK_ROWS = {"cpu": 64}
_BLOCK_ROWS_OF_ACCELERATORS = 512
# Key ranges of a multiple of 16 are 12% faster on a CPU and keep the mask aligned for CUDA kernels.
_KEY_MULTIPLE = 16

# Read once per micro-batch for all layers: the tensors found to be plain causal masks, and the
# segments of a PackedSeqParams with what they were read from.
_causal_masks = WeakIdKeyDictionary()
_segments = WeakIdKeyDictionary()


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


class QueryBlock(NamedTuple):
    """Queries at ``position .. position + num_rows`` and their keys ``key_start .. key_end``."""

    position: int
    num_rows: int
    key_start: int
    key_end: int


def query_blocks(
    segment: Segment, *, num_keys: int, window: int | None, block_rows: int
) -> list[QueryBlock]:
    """Cut a segment into blocks, each with the range of keys that its queries may see.

    A range is widened to a multiple of 16 where there are keys; the mask hides what that adds.

    Args:
        segment: Where the queries stand.
        num_keys: Number of keys there are.
        window: Keys that a query sees, itself included; None for all earlier ones.
        block_rows: Queries of a block; the last block may have fewer.

    Source: report eq 8, position t sees max(1, t - w + 1) .. t.
    """
    blocks = []
    for offset in range(0, segment.num_queries, block_rows):
        position = segment.position + offset
        num_rows = min(block_rows, segment.num_queries - offset)
        skipped = 0 if window is None else max(0, position - window + 1 - segment.first_key)
        key_start = segment.first_key + skipped // _KEY_MULTIPLE * _KEY_MULTIPLE
        width = _round_up(position + num_rows - key_start)
        blocks.append(QueryBlock(position, num_rows, key_start, min(num_keys, key_start + width)))
    return blocks


@functools.lru_cache(maxsize=32)
def band_mask(
    num_rows: int,
    reach: int,
    window: int | None,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The additive mask that every block of a layer takes its columns from.

    Row i belongs to the query i positions after the first of the block, column c to the key c -
    reach positions after it.  Cached: a step builds no mask.

    Args:
        num_rows: Queries of a block.
        reach: Keys before the first query that the mask covers.
        window: Keys that a query sees, itself included; None for all earlier ones.
        repeats: Query heads of a group; each row is repeated so often.
        dtype: Of the mask; an additive mask must have the dtype of the queries.
        device: Of the mask.

    Returns:
        0 where visible and -inf elsewhere,
        ``[num_rows * repeats, reach + num_rows rounded up to 16 + 16]``.
    """
    # A tensor made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        query = torch.arange(num_rows, device=device)[:, None]
        # The range of a block ends up to 15 keys after its last query.
        key = torch.arange(-reach, _round_up(num_rows) + _KEY_MULTIPLE, device=device)
        hidden = key > query
        if window is not None:
            hidden = hidden | (key <= query - window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return mask.masked_fill(hidden, float("-inf")).repeat_interleave(repeats, dim=0)


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[Segment],
    *,
    window: int | None,
    scale: float,
    block_rows: int,
) -> torch.Tensor:
    """Attention of every query to the keys of its document up to itself, inside the window.

    Args:
        query: ``[sq, b, np, hn]``, segment after segment.
        key: ``[sk, b, ng, hn]``; ng divides np.
        value: ``[sk, b, ng, hn]``.
        segments: Where the queries stand among the keys.
        window: Keys that a query sees, itself included; None for all earlier ones.
        scale: Factor of the scores.
        block_rows: Queries of a block.

    Returns:
        ``[sq, b, np * hn]``.

    Source: report eq 1-14 (scores and sum), eq 8 (window).
    """
    num_keys, _, num_groups, _ = key.shape
    heads = query.unflatten(2, (num_groups, -1))  # [sq, b, ng, np / ng, hn]
    blocks = [
        block
        for segment in segments
        for block in query_blocks(segment, num_keys=num_keys, window=window, block_rows=block_rows)
    ]
    num_rows = max(block.num_rows for block in blocks)
    reach = _reach(num_keys, window)
    mask = band_mask(num_rows, reach, window, heads.size(3), query.dtype, query.device)
    ranges = [(block.key_start, block.key_end) for block in blocks]
    rows = heads.split([block.num_rows for block in blocks])
    keys, values = _KeyRanges.apply(key, ranges), _KeyRanges.apply(value, ranges)
    outputs = [
        _attend(q, k, v, _mask_of_block(mask, block, reach, heads.size(3)), scale)
        for q, k, v, block in zip(rows, keys, values, blocks, strict=True)
    ]
    return torch.cat(outputs).flatten(2)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Plain causal attention in one call without a mask: the flash kernels of CUDA.

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


def logit_bound(query: torch.Tensor, key: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Upper bound of the attention logits of a layer: no product of all pairs is needed.

    ``scale * max |q| * max |k|``, head by head (Cauchy-Schwarz).  With QK-norm it is close: all
    vectors have about the same length.

    Args:
        query: ``[sq, b, np, hn]``.
        key: ``[sk, b, ng, hn]``; ng divides np.
        scale: Factor of the scores.

    Returns:
        Scalar, fp32.
    """
    longest_query, longest_key = (
        torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32).amax(dim=0)
        for vectors in (query, key)
    )
    by_group = longest_query.unflatten(-1, (key.size(2), -1))  # [b, ng, np / ng]
    return scale * (by_group * longest_key.unsqueeze(-1)).max()


def gather_keys_and_values(
    key: torch.Tensor, value: torch.Tensor, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of the sequence, in its order, from the ranks of context parallelism.

    One all-gather; the gradients come back with one reduce-scatter.

    Args:
        key: ``[s / cp, b, ng, hn]``: of the 2 cp chunks of the sequence, rank r holds r and then
            2 cp - 1 - r (``megatron.core.utils.get_batch_on_this_cp_rank``).
        value: The same of the values.
        group: The ranks of context parallelism.

    Returns:
        Keys and values, ``[s, b, ng, hn]``.
    """
    local = torch.cat((key, value), dim=-1)
    gathered = gather_from_sequence_parallel_region(local, group=group)
    by_rank = gathered.unflatten(0, (group.size(), 2, -1))
    chunks = torch.cat((by_rank[:, 0], by_rank[:, 1].flip(0)))
    keys, values = chunks.flatten(0, 1).split([key.size(-1), value.size(-1)], dim=-1)
    return keys, values


def zigzag_segments(num_queries: int, *, cp_size: int, cp_rank: int) -> list[Segment]:
    """Where the two chunks of a rank of context parallelism stand in the sequence.

    Args:
        num_queries: Queries of this rank, s / cp.
        cp_size: Number of ranks.
        cp_rank: This rank.
    """
    length = num_queries // 2
    return [Segment(chunk * length, length) for chunk in (cp_rank, 2 * cp_size - 1 - cp_rank)]


def document_segments(packed_seq_params: PackedSeqParams, num_tokens: int) -> list[Segment]:
    """The documents of a packed row of tokens; read once per ``PackedSeqParams``.

    The boundaries are read on the host, as Megatron's rotary embedding of packed rows reads them.

    Args:
        packed_seq_params: ``cu_seqlens_q`` (int32 ``[num_documents + 1]``), or the padded one where
            there is one: a document's padding comes after its tokens, which do not see it.
        num_tokens: Length of the row; tokens after the last boundary are one more document.

    Raises:
        ValueError: The boundaries do not start at 0, decrease, or exceed the row.
    """
    padded = packed_seq_params.cu_seqlens_q_padded
    boundaries = packed_seq_params.cu_seqlens_q if padded is None else padded
    known = _segments.get(packed_seq_params)
    if known is None or known[0] is not boundaries or known[1] != num_tokens:
        segments = _segments_between(boundaries.flatten().tolist(), num_tokens)
        known = _segments[packed_seq_params] = (boundaries, num_tokens, segments)
    return known[2]


def check_causal_mask(
    attention_mask: torch.Tensor, segments: Sequence[Segment], num_keys: int
) -> None:
    """Refuse a mask that hides anything but later tokens; compared once per mask.

    Args:
        attention_mask: True where hidden, ``[1 or b, 1, sq, sk]``.
        segments: Where the queries stand among the keys.
        num_keys: sk.

    Raises:
        ValueError: The mask is another one.
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


class TrinityDotProductAttention(MegatronModule):
    """Megatron's ``core_attention`` of a local or a global layer, without Transformer Engine.

    A layer is local, with a window of ``config.window_size[0] + 1`` keys, where
    ``is_layer_window_attention`` says so: with ``window_attn_skip_freq=4`` each but every fourth.
    Attention is always causal; fewer queries than keys (a KV cache) are the last positions.

    Args:
        config: Megatron config.
        layer_number: Number of the layer in the model, from 1.
        attn_mask_type: Must be a causal one.
        attention_type: ``"self"``.
        attention_dropout: None or 0.
        softmax_scale: Factor of the scores; None for 1 / sqrt(hn).
        cp_comm_type: With context parallelism: keys and values are gathered whatever of None,
            ``"p2p"`` (Megatron's default) and ``"all_gather"`` is given; others are refused.
        pg_collection: Its ``cp`` is the group of context parallelism.
        **kwargs: Keywords that later Megatron versions add.

    Raises:
        ValueError: The config asks for what is not supported here; the field is named.

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
        _refuse_unsupported(config, attn_mask_type, attention_type, dropout)
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
        """Attend.

        Args:
            query: ``[sq, b, np, hn]``, or ``[t, np, hn]`` with packed documents.
            key: ``[sk, b, ng, hn]`` or ``[t, ng, hn]``.
            value: As key.
            attention_mask: None, or the plain causal mask ``[1 or b, 1, sq, sk]``.
            attn_mask_type: Not needed; with a KV cache Megatron passes ``no_mask``.
            attention_bias: Must be None.
            packed_seq_params: Document boundaries, format ``thd``.

        Returns:
            ``[sq, b, np * hn]`` or ``[t, np * hn]``.

        Raises:
            ValueError: A mask that is not causal, a bias, or packing that is not supported.
        """
        if attention_bias is not None:
            raise ValueError(
                "attention_bias is not supported by the local attention. Remedy: pass None."
            )
        if packed_seq_params is not None:
            return self._attend_to_documents(query, key, value, attention_mask, packed_seq_params)
        if self.cp_size > 1:
            key, value = gather_keys_and_values(key, value, self.cp_group)
            segments = zigzag_segments(
                query.size(0), cp_size=self.cp_size, cp_rank=get_pg_rank(self.cp_group)
            )
        else:
            assert query.size(0) <= key.size(0), "there is a key for every query"
            segments = [Segment(key.size(0) - query.size(0), query.size(0))]
        if attention_mask is not None:
            check_causal_mask(attention_mask, segments, key.size(0))
        return self._attend(query, key, value, segments)

    def _attend_to_documents(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams,
    ) -> torch.Tensor:
        _refuse_packing(packed_seq_params, attention_mask, self.cp_size, query, key)
        segments = document_segments(packed_seq_params, query.size(0))
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
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
        if STATISTICS.is_collecting and self.training and torch.is_grad_enabled():
            STATISTICS.observe(
                "attention/logit_bound",
                layer=self.layer_number,
                count=0,
                total=0,
                maximum=logit_bound(query.detach(), key.detach(), scale=scale),
            )
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


# A step needs two, for local and global layers; documents bring new ones with every micro-batch.
@functools.lru_cache(maxsize=8)
def _block_mask(
    segments: tuple[Segment, ...], num_keys: int, window: int | None, device: torch.device
) -> BlockMask:
    with torch.inference_mode(False):
        return range_block_mask(key_ranges(segments, window=window, device=device), num_keys)


class _KeyRanges(torch.autograd.Function):
    """Overlapping ranges of the first dimension as views; their gradients are added in one tensor.

    Plain slicing would fill and add a tensor of full length for each range.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, ranges: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, tensor.shape
        return tuple(tensor[start:end] for start, end in ranges)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # A key may get a part from many blocks: add them in fp32, as fused kernels do.
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        total = grads[0].new_zeros(ctx.shape, dtype=dtype)
        for (start, end), grad in zip(ctx.ranges, grads, strict=True):
            total[start:end] += grad
        return total.to(grads[0].dtype), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``[rows, b, ng, r, hn]`` queries on ``[keys, b, ng, hn]``; the r heads of a group are rows.

    So the kernel sees as many heads of queries as of keys: those of CUDA that take a mask know no
    groups, and in bf16 a CPU is 30% faster than with ``enable_gqa=True``.
    """
    num_rows, _, _, repeats, _ = query.shape
    folded = query.permute(1, 2, 0, 3, 4).flatten(2, 3)
    output = F.scaled_dot_product_attention(
        folded, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), attn_mask=mask, scale=scale
    )
    return output.unflatten(2, (num_rows, repeats)).permute(2, 0, 1, 3, 4)


def _mask_of_block(mask: torch.Tensor, block: QueryBlock, reach: int, repeats: int) -> torch.Tensor:
    first = block.key_start - block.position + reach
    return mask[: block.num_rows * repeats, first : first + block.key_end - block.key_start]


def _reach(num_keys: int, window: int | None) -> int:
    # A power of two, so that a growing KV cache does not ask for a new mask at every token.
    longest = max(_KEY_MULTIPLE, 1 << (num_keys - 1).bit_length())
    return longest if window is None else min(longest, _round_up(window - 1 + _KEY_MULTIPLE))


def _round_up(number: int, multiple: int = _KEY_MULTIPLE) -> int:
    return -(-number // multiple) * multiple


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


def _window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """Keys that a query of the layer sees, itself included; None in a global layer."""
    size, skip = config.window_size, config.window_attn_skip_freq
    if not size or not is_layer_window_attention(size, skip, layer_number):  # type: ignore[arg-type]
        return None
    before, after = size
    if before < 0:  # Megatron's word for no limit
        return None
    if after != 0:
        raise UserError(
            f"window_size={size} lets a token see later ones. Remedy: ({before}, 0), a window of "
            f"{before + 1} keys."
        )
    return before + 1


def _refuse_unsupported(
    config: TransformerConfig, attn_mask_type: AttnMaskType, attention_type: str, dropout: float
) -> None:
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


def _refuse_packing(
    packed_seq_params: PackedSeqParams,
    attention_mask: torch.Tensor | None,
    cp_size: int,
    query: torch.Tensor,
    key: torch.Tensor,
) -> None:
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format={packed_seq_params.qkv_format!r} is not supported by "
            "the local attention. Remedy: 'thd'."
        )
    if cp_size > 1:
        # Megatron splits inter-document batches over the whole row, but its rotary embedding of
        # packed rows expects every document to be split by itself.
        raise UserError(
            f"context_parallel_size={cp_size} cannot be combined with packed documents "
            "(--dataloader-inter-document-masking) in the local attention. Remedy: "
            "--context-parallel-size 1, or no inter-document masking."
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
