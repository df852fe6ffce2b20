"""Causal attention with a sliding window and documents, computed in blocks of queries.

The queries are cut into blocks of consecutive rows.  A block attends only to the keys that its rows
may see: from the start of the window, or of the document, to its last row.  The work of a local
layer therefore grows with sequence x window.  Documents, the chunks of a context-parallel rank and
decoding with a KV cache differ only in where the blocks start; none needs a mask of its own.

All blocks of a layer share one mask of the shape of a single block.  On a CPU, the blocks are 2.8
times as fast as one causal call over all keys for a window of a quarter of the sequence, and 1.6
times as fast for a global layer, because torch's CPU kernel skips masked keys only in steps of 512.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from trinity_megatron.model.attention.segments import Segment

# Key ranges of a multiple of 16 are 12% faster on a CPU, and CUDA kernels need masks so aligned.
_KEY_MULTIPLE = 16


class QueryBlock(NamedTuple):
    """A block of queries: ``position .. position + num_rows``, keys ``key_start .. key_end``."""

    position: int
    num_rows: int
    key_start: int
    key_end: int


def query_blocks(
    segment: Segment, *, num_keys: int, window: int | None, block_rows: int
) -> list[QueryBlock]:
    """Split a segment into blocks, each with the range of keys that its queries attend to.

    The length of a range is rounded up to a multiple of 16; the mask hides the additional keys.

    Args:
        segment: Position of the queries.
        num_keys: Number of keys.
        window: Keys that a query attends to, its own included; None for all earlier keys.
        block_rows: Queries per block; the last block may have fewer.

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
    """Additive mask of a layer, of which every block uses a range of columns.

    Relative to the first query of the block, row i is the query at i and column c the key at
    c - reach.  The mask is cached, so a training step builds none.

    Args:
        num_rows: Queries per block.
        reach: Number of keys before the first query that the mask covers.
        window: Keys that a query attends to, its own included; None for all earlier keys.
        repeats: Query heads per group; each row is repeated as often.
        dtype: Dtype of the mask: that of the queries.
        device: Device of the mask.

    Returns:
        0 for visible keys and -inf for hidden keys,
        ``[num_rows * repeats, reach + num_rows rounded up to 16 + 16]``.
    """
    # Autograd cannot save a tensor that was created in inference mode.
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
    """Causal attention within documents, with an optional sliding window.

    Args:
        query: ``[sq, b, np, hn]``, in the order of the segments.
        key: ``[sk, b, ng, hn]``; ng divides np.
        value: ``[sk, b, ng, hn]``.
        segments: Positions of the queries.
        window: Keys that a query attends to, its own included; None for all earlier keys.
        scale: Factor of the scores.
        block_rows: Queries per block.

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
        _attend(q, k, v, _block_columns(mask, block, reach, heads.size(3)), scale)
        for q, k, v, block in zip(rows, keys, values, blocks, strict=True)
    ]
    return torch.cat(outputs).flatten(2)


class _KeyRanges(torch.autograd.Function):
    """Views of overlapping ranges of the first dimension, with gradients added in one tensor.

    The backward pass of plain slicing would fill and add a full-length tensor for each range.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, ranges: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, tensor.shape
        return tuple(tensor[start:end] for start, end in ranges)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # A key gets gradients from several blocks: add them in fp32, as fused kernels do.
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
    """Attention of queries ``[rows, b, ng, r, hn]`` to keys ``[keys, b, ng, hn]``.

    The r query heads of a group become rows, so that the kernel gets as many query heads as key
    heads: CUDA kernels with a mask do not support grouped queries, and in bf16 on a CPU this is 30%
    faster than ``enable_gqa=True``.
    """
    num_rows, _, _, repeats, _ = query.shape
    folded = query.permute(1, 2, 0, 3, 4).flatten(2, 3)
    output = F.scaled_dot_product_attention(
        folded, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), attn_mask=mask, scale=scale
    )
    return output.unflatten(2, (num_rows, repeats)).permute(2, 0, 1, 3, 4)


def _block_columns(mask: torch.Tensor, block: QueryBlock, reach: int, repeats: int) -> torch.Tensor:
    first = block.key_start - block.position + reach
    return mask[: block.num_rows * repeats, first : first + block.key_end - block.key_start]


def _reach(num_keys: int, window: int | None) -> int:
    # A power of two, so that a growing KV cache does not need a new mask for every token.
    longest = max(_KEY_MULTIPLE, 1 << (num_keys - 1).bit_length())
    return longest if window is None else min(longest, _round_up(window - 1 + _KEY_MULTIPLE))


def _round_up(number: int, multiple: int = _KEY_MULTIPLE) -> int:
    return -(-number // multiple) * multiple
