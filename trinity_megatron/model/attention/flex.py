"""Attention in one fused kernel on a GPU: torch's FlexAttention.

Whatever the window, the documents and the part of the sequence that a rank has, a query sees one
range of consecutive keys.  That range is the whole mask, and the blocks of the kernel that lie
outside of it, or wholly inside, are known without looking at single elements.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from trinity_megatron.model.device_copy import copy_to
from trinity_megatron.model.fusion import can_compile

# Queries and keys of a block, FlexAttention's own default.
BLOCK = 128
# Triton's products want this many columns.
_SMALLEST_HEAD = 16
# Of the backward pass: what torch 2.13 takes by itself for heads of 128 spills registers to memory,
# on Blackwell 9504 bytes of every thread, on Hopper 160.  This one spills none on either; it is the
# largest of those without, chosen from compiled code, not measured.
_BACKWARD_TILING = {
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 128,
    "bwd_BLOCK_M2": 128,
    "bwd_BLOCK_N2": 32,
    "bwd_num_stages": 3,
    "bwd_num_warps": 8,
}
_TILED_HEAD, _TILED_CAPABILITIES = 128, (9, 10)


class KeyRanges(NamedTuple):
    """First and last key that each query sees, int32 ``[sq]`` each."""

    first: torch.Tensor
    last: torch.Tensor


def key_ranges(
    segments: Sequence[tuple[int, int, int]], *, window: int | None, device: torch.device
) -> KeyRanges:
    """The keys that each query sees.

    Args:
        segments: Position of the first query, number of queries, first key of the document, of each
            run of consecutive queries (:class:`.segments.Segment`).
        window: Keys that a query sees, itself included; None for all earlier ones.
        device: Of the result.

    Source: report eq 8, position t sees max(1, t - w + 1) .. t.
    """
    starts, lengths, documents = zip(*segments, strict=True)
    ends = torch.tensor(lengths).cumsum(0)
    within = torch.arange(int(ends[-1])) - (ends - torch.tensor(lengths)).repeat_interleave(
        torch.tensor(lengths)
    )
    last = within + torch.tensor(starts).repeat_interleave(torch.tensor(lengths))
    first = torch.tensor(documents).repeat_interleave(torch.tensor(lengths))
    if window is not None:
        first = torch.maximum(first, last - window + 1)
    return KeyRanges(*copy_to(torch.stack([first, last]).int(), device))


def range_block_mask(ranges: KeyRanges, num_keys: int) -> BlockMask:
    """FlexAttention's mask of one range of keys for each query.

    Args:
        ranges: First and last key of each query, ``[sq]``.
        num_keys: Number of keys there are.

    Returns:
        A mask of blocks of 128 x 128 for all batches and heads: those outside are never visited,
        those wholly inside are taken without a mask.
    """
    num_queries = len(ranges.first)
    first, last = (_by_block(tensor) for tensor in ranges)
    starts = torch.arange(0, num_keys, BLOCK, device=first.device)
    ends = (starts + BLOCK).clamp(max=num_keys) - 1
    # A block is touched from the smallest first key of its queries to the largest last one ...
    touched = (ends >= first.amin(1)[:, None]) & (starts <= last.amax(1)[:, None])
    # ... and full where every query of it sees every key of it.
    full = (starts >= first.amax(1)[:, None]) & (ends <= last.amin(1)[:, None])
    full &= ends - starts == BLOCK - 1  # the last, short one is masked by its length
    if num_queries % BLOCK:
        full[-1] = False

    def mask_mod(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (key >= ranges.first[query]) & (key <= ranges.last[query])

    return BlockMask.from_kv_blocks(
        *_ordered(touched & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of every query to its range of keys.

    Args:
        query: ``[sq, b, np, hn]``.
        key: ``[sk, b, ng, hn]``; ng divides np.
        value: ``[sk, b, ng, hn]``.
        block_mask: From :func:`range_block_mask`.
        scale: Factor of the scores.

    Returns:
        ``[sq, b, np * hn]``.
    """
    heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    attend: Any = _compiled() if query.is_cuda else flex_attention
    output = attend(
        *heads_first,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
        kernel_options=_kernel_options(query),
    )
    return output.permute(2, 0, 1, 3).flatten(2)


def has_fused_attention(query: torch.Tensor) -> bool:
    """Whether these queries ``[sq, b, np, hn]`` should go through FlexAttention.

    On CUDA, with Triton and no ban on compiling, and for whole blocks of queries: every new length
    is compiled once, and a text that is generated has a new length with every token.
    """
    size = query.shape[-1]
    is_power_of_two = size >= _SMALLEST_HEAD and size & (size - 1) == 0
    has_blocks = query.shape[0] % BLOCK == 0
    return query.is_cuda and is_power_of_two and has_blocks and can_compile()


def _kernel_options(query: torch.Tensor) -> dict[str, int] | None:
    """Options of the kernels for these queries ``[sq, b, np, hn]``; None for torch's own choice."""
    if not query.is_cuda or query.shape[-1] != _TILED_HEAD or query.dtype.itemsize != 2:
        return None
    major, _ = torch.cuda.get_device_capability(query.device)
    return _BACKWARD_TILING if major in _TILED_CAPABILITIES else None


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Shapes are few and lasting: one kernel for each, rather than one for all.
    return torch.compile(flex_attention, dynamic=False)


def _by_block(tensor: torch.Tensor) -> torch.Tensor:
    """``[n]`` -> ``[blocks, 128]``; the last element fills up the last block."""
    missing = -len(tensor) % BLOCK
    return torch.cat([tensor, tensor[-1:].expand(missing)]).unflatten(0, (-1, BLOCK))


def _ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool ``[query blocks, key blocks]`` -> counts and indices, chosen ones first.

    Both int32 with axes of length one for batches and heads before them.
    """
    counts = chosen.sum(1, dtype=torch.int32)
    indices = torch.argsort(~chosen, dim=1, stable=True).int()
    return counts[None, None], indices[None, None]
