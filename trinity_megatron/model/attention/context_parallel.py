"""Context parallelism of the local attention: all-gather of keys and values."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from trinity_megatron.model.attention.segments import Segment


def gather_keys_and_values(
    key: torch.Tensor, value: torch.Tensor, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """All-gather keys and values over the context-parallel ranks, in the order of the sequence.

    The backward pass is one reduce-scatter.

    Args:
        key: ``[s / cp, b, ng, hn]``.  Of the 2 cp chunks of the sequence, rank r has chunks r and
            2 cp - 1 - r (``megatron.core.utils.get_batch_on_this_cp_rank``).
        value: ``[s / cp, b, ng, hn]``.
        group: Context-parallel group.

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
    """Segments of the two chunks of a context-parallel rank.

    Args:
        num_queries: Queries of this rank, s / cp.
        cp_size: Size of the context-parallel group.
        cp_rank: Rank in the group.
    """
    length = num_queries // 2
    return [Segment(chunk * length, length) for chunk in (cp_rank, 2 * cp_size - 1 - cp_rank)]
