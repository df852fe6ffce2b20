"""Context parallelism of the local attention: the keys and values that a rank's queries see.

Global layers gather the whole sequence.  Local layers exchange the window alone, in one all-to-all
with the neighbours of each chunk.
"""

from functools import lru_cache
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from trinity_megatron.model.attention.segments import Segment
from trinity_megatron.model.attention.zigzag import WindowExchange, ZigzagCut, plan_exchange

Group = torch.distributed.ProcessGroup


def share_keys_and_values(
    key: torch.Tensor, value: torch.Tensor, window: int | None, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the keys and values that this rank's queries see, in order of position.

    Their gradients go back to their owners and are added there.

    Args:
        key: ``[s / cp, b, ng, hn]``, cut as :class:`.zigzag.ZigzagCut` says.
        value: ``[s / cp, b, ng, hn]``.
        window: Keys that a query sees, its own included; None for the whole sequence.
        group: Context-parallel group.

    Returns:
        Keys and values, ``[sk, b, ng, hn]``, at the positions ``ZigzagCut.keys_of``.
    """
    local = torch.cat((key, value), dim=-1)
    if window is None:
        shared = _gather(local, group)
    else:
        cut = ZigzagCut(key.size(0) * group.size(), group.size())
        shared = _WindowExchange.apply(local, plan_exchange(cut, group.rank(), window), group)
    keys, values = shared.split([key.size(-1), value.size(-1)], dim=-1)
    return keys, values


def _gather(local: torch.Tensor, group: Group) -> torch.Tensor:
    """``[s / cp, ...]`` -> ``[s, ...]`` in order of position; backward is one reduce-scatter."""
    gathered = gather_from_sequence_parallel_region(local, group=group)
    by_rank = gathered.unflatten(0, (group.size(), 2, -1))
    return torch.cat((by_rank[:, 0], by_rank[:, 1].flip(0))).flatten(0, 1)


class _WindowExchange(torch.autograd.Function):
    """Rows of this rank -> rows that its queries see; one all-to-all in either direction."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, plan: WindowExchange, group: Group) -> torch.Tensor:
        ctx.plan, ctx.group, ctx.num_rows = plan, group, local.size(0)
        outgoing = [local[span.start : span.end] for spans in plan.sent for span in spans]
        received = _all_to_all(
            torch.cat([local[:0], *outgoing]), plan.num_sent, plan.num_received, group
        )
        by_rank = received.split(plan.num_received)
        taken = [0] * len(by_rank)
        parts = []
        for owner, rows in plan.parts:
            if owner == plan.rank:
                parts.append(local[rows.start : rows.end])
            else:
                parts.append(by_rank[owner].narrow(0, taken[owner], rows.length))
                taken[owner] += rows.length
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        plan = ctx.plan
        pieces = grad.split([rows.length for _, rows in plan.parts])
        by_rank: list[list[torch.Tensor]] = [[] for _ in plan.sent]
        # A key gets gradients from several ranks: add them in fp32, as fused kernels do.
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros((ctx.num_rows, *grad.shape[1:]), dtype=dtype)
        for (owner, rows), piece in zip(plan.parts, pieces, strict=True):
            if owner == plan.rank:
                total[rows.start : rows.end] += piece
            else:
                by_rank[owner].append(piece)
        outgoing = [piece for pieces_of_owner in by_rank for piece in pieces_of_owner]
        received = _all_to_all(
            torch.cat([grad[:0], *outgoing]), plan.num_received, plan.num_sent, ctx.group
        )
        spans = [span for spans in plan.sent for span in spans]
        for span, piece in zip(spans, received.split([s.length for s in spans]), strict=True):
            total[span.start : span.end] += piece
        return total.to(grad.dtype), None, None


def _all_to_all(
    rows: torch.Tensor, num_sent: list[int], num_received: list[int], group: Group
) -> torch.Tensor:
    received = rows.new_empty((sum(num_received), *rows.shape[1:]))
    torch.distributed.all_to_all_single(received, rows, num_received, num_sent, group=group)
    return received


@lru_cache(maxsize=8)
def rank_segments(
    documents: tuple[Segment, ...], cut: ZigzagCut, rank: int, window: int | None
) -> tuple[Segment, ...]:
    """Segments of a rank's queries among the keys of :func:`share_keys_and_values`.

    Args:
        documents: Segments of the whole sequence.
        cut: Of the sequence.
        rank: In the context-parallel group.
        window: Keys that a query sees, its own included; None for the whole sequence.
    """
    segments: list[Segment] = []
    keys = cut.keys_of(rank, window)
    for chunk in cut.spans_of(rank):
        around = next(span for span in keys if span.start <= chunk.start < span.end)
        # From positions to the rank's keys.
        moved = sum(span.length for span in keys if span.end <= around.start) - around.start
        for document in documents:
            start = max(document.position, chunk.start)
            end = min(document.position + document.num_queries, chunk.end)
            if start < end:
                seen = max(document.first_key, around.start)
                segments.append(Segment(start + moved, end - start, seen + moved))
    return tuple(segments)
