"""Definitions of the metrics of a step: pure functions, each metric defined here and nowhere else.

``counts`` are the tokens that each expert received in the step over the global batch.
"""

import math

import torch

from trinity_megatron.telemetry.step_statistics import STATISTIC_NAMES

# Steps without a token after which an expert is called dead.
DEAD_EXPERT_WINDOW = 100


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


def load_entropy(tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Entropy of the load over the experts, divided by that of perfect balance.

    Args:
        tokens_per_expert: Counts, ``[..., num_experts]``.

    Returns:
        fp64 ``[...]``; 1 is perfect balance, 0 one expert for all; 0 for a layer without tokens.
    """
    share = tokens_per_expert.double()
    share = share / share.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.xlogy(share, share).sum(dim=-1)
    return entropy / math.log(tokens_per_expert.shape[-1])


def count_idle_steps(idle_steps: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """For how many steps in a row each expert has received nothing.

    Args:
        idle_steps: Its value of the step before, int64 ``[..., num_experts]``.
        tokens_per_expert: Counts of this step, same shape.
    """
    return (idle_steps + 1) * (tokens_per_expert == 0)


def batch_heterogeneity(loss_sums: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    r"""BatchHet: how far the worst micro-batch of a step is above the mean of all.

    .. math:: \max_i L_i - \frac{1}{M} \sum_i L_i

    Args:
        loss_sums: Summed loss of each micro-batch of all data-parallel ranks, fp64 ``[M]``.
        num_tokens: Tokens of each micro-batch, fp64 ``[M]``; those without tokens are left out.

    Returns:
        Scalar in nats per token; NaN if there is no micro-batch.

    Source: report section 3.2.
    """
    losses = loss_sums[num_tokens > 0] / num_tokens[num_tokens > 0]
    return losses.max() - losses.mean() if len(losses) else torch.tensor(math.nan)


def routing_metrics(
    tokens_per_expert: torch.Tensor,
    expert_bias: torch.Tensor,
    bias_momentum: torch.Tensor,
    idle_steps: torch.Tensor,
) -> dict[str, float]:
    """The scalars of a step that describe load and bias of all MoE layers together.

    The per-layer values are in the tensors that the run's TensorBoard files keep.

    Args:
        tokens_per_expert: Global counts, int64 ``[num_layers, num_experts]``.
        expert_bias: After the update, fp32 ``[num_layers, num_experts]``.
        bias_momentum: After the update, same shape.
        idle_steps: See :func:`count_idle_steps`, same shape.

    Returns:
        By name: MaxVio (largest and mean over the layers), load relative to the mean (least,
        quantiles averaged over the layers, largest), entropy, experts without a token in this step
        and in the last :data:`DEAD_EXPERT_WINDOW` steps, and the bias: largest size, largest range
        within a layer, and root mean square of bias and momentum.
    """
    load, violation = load_share(tokens_per_expert), max_violation(tokens_per_expert)
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=load.device)
    low, median, high = torch.quantile(load, levels, dim=-1).mean(dim=-1)
    entropy = load_entropy(tokens_per_expert)
    bias, momentum = expert_bias.double(), bias_momentum.double()
    values = {
        "moe/max_violation": violation.max(),
        "moe/mean_max_violation": violation.mean(),
        "moe/load_min": load.min(),
        "moe/load_q10": low,
        "moe/load_median": median,
        "moe/load_q90": high,
        "moe/load_max": load.max(),
        "moe/load_entropy": entropy.mean(),
        "moe/load_entropy_min": entropy.min(),
        "moe/dead_experts": num_dead_experts(tokens_per_expert).sum(),
        "moe/dead_experts_window": (idle_steps >= DEAD_EXPERT_WINDOW).sum(),
        "moe/bias_max_abs": bias.abs().max(),
        "moe/bias_range": (bias.amax(dim=-1) - bias.amin(dim=-1)).max(),
        "moe/bias_norm": bias.square().mean().sqrt(),
        "moe/bias_momentum_norm": momentum.square().mean().sqrt(),
    }
    # One copy to the host for all of them.
    return dict(
        zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True)
    )


def logit_metrics(statistics: torch.Tensor, *, z_loss_coeff: float) -> dict[str, float]:
    """Router, attention and LM-head logit metrics from a step's global statistics.

    Args:
        statistics: Count, total and maximum, fp64 ``[len(STATISTIC_NAMES), num_layers + 1, 3]`` on
            the host.
        z_loss_coeff: Coefficient of the LM-head z-loss.

    Returns:
        By name; what nothing was seen of is left out.
    """
    count, total, maximum = statistics[:, :, 0], statistics[:, :, 1], statistics[:, :, 2]
    mean = dict(zip(STATISTIC_NAMES, (total.sum(1) / count.sum(1)).tolist(), strict=True))
    highest = dict(zip(STATISTIC_NAMES, maximum.max(dim=1).values.tolist(), strict=True))
    values = {
        "router/max_logit": highest["router/logit"],
        "router/mean_logit": mean["router/logit"],
        "router/logit_std": max(mean["router/logit_square"] - mean["router/logit"] ** 2, 0.0)
        ** 0.5,
        "attention/max_logit_bound": highest["attention/logit_bound"],
        "lm_head/max_logit": highest["lm_head/logit"],
        "lm_head/mean_logit": mean["lm_head/logit"],
        "lm_head/mean_logsumexp": mean["lm_head/logsumexp"],
        "lm_head/z_loss": z_loss_coeff * mean["lm_head/logsumexp_square"],
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}
