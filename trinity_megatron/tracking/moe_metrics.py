"""Definitions of the routing metrics: pure functions of the global token counts."""

import torch


def max_violation(tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """MaxVio: how far the busiest expert is above the mean load, ``(max - mean) / mean``.

    Args:
        tokens_per_expert: Counts, ``[..., num_experts]``.

    Returns:
        fp64 ``[...]``; 0 is perfect balance, ``num_experts / topk - 1`` total collapse.

    Source: report eq 42.
    """
    loads = tokens_per_expert.double()
    mean = loads.mean(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return (loads.max(dim=-1).values - mean).clamp_min(0.0) / mean


def num_dead_experts(tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Experts without a single token.

    Args:
        tokens_per_expert: Counts, ``[..., num_experts]``.

    Returns:
        int64 ``[...]``.
    """
    return (tokens_per_expert == 0).sum(dim=-1)


def load_share(tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Load of each expert relative to the mean of its layer: 1 is balance.

    Args:
        tokens_per_expert: Counts, ``[..., num_experts]``.

    Returns:
        fp64 of the same shape.
    """
    loads = tokens_per_expert.double()
    return loads / loads.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
