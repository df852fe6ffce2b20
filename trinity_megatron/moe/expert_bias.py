"""The two rules that move the expert bias: the report's equations as pure functions.

``n_i`` is the number of tokens that expert i received in the step over the global batch, and
``nbar`` their mean over the experts of the layer.
"""

import torch


def smebu_update(
    expert_bias: torch.Tensor,
    bias_momentum: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    *,
    update_rate: float,
    momentum: float,
    clamp_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""SMEBU: one step of the soft-clamped momentum expert bias update.

    .. math::
        v_i = (\bar n - n_i) / \bar n, \qquad
        \Delta_i = \lambda \tanh(\kappa v_i) - \frac{1}{N} \sum_j \lambda \tanh(\kappa v_j)

        m_i \leftarrow \beta m_i + (1 - \beta) \Delta_i, \qquad b_i \leftarrow b_i + m_i

    Args:
        expert_bias: b, fp32 (fp64 in tests), ``[..., num_experts]``.
        bias_momentum: m, same shape and dtype.
        tokens_per_expert: n, any integer or floating dtype, same shape.
        update_rate: lambda.
        momentum: beta.
        clamp_scale: kappa.

    Returns:
        New bias and new momentum.  A layer that saw no token at all keeps its bias and decays its
        momentum.

    Source: report eq 23-28.
    """
    loads = tokens_per_expert.to(expert_bias.dtype)
    mean_load = loads.mean(dim=-1, keepdim=True)
    # No token: n = nbar = 0, the violation is 0 and not 0/0.
    violation = (mean_load - loads) / mean_load.clamp_min(torch.finfo(loads.dtype).tiny)
    delta = update_rate * torch.tanh(clamp_scale * violation)
    delta = delta - delta.mean(dim=-1, keepdim=True)
    new_momentum = momentum * bias_momentum + (1.0 - momentum) * delta
    return expert_bias + new_momentum, new_momentum


def sign_update(
    expert_bias: torch.Tensor, tokens_per_expert: torch.Tensor, *, update_rate: float
) -> torch.Tensor:
    r"""The sign rule with recentring.

    .. math:: b_i \leftarrow b_i + \gamma \, \mathrm{sign}(\bar n - n_i), \qquad
        b \leftarrow b - \mathrm{mean}(b)

    Args:
        expert_bias: b, fp32 (fp64 in tests), ``[..., num_experts]``.
        tokens_per_expert: n, any integer or floating dtype, same shape.
        update_rate: gamma.

    Returns:
        New bias, with mean zero.

    Source: report eq 19-22.
    """
    num_experts = tokens_per_expert.shape[-1]
    # sign(nbar - n) = sign(sum(n) - N n): exact in integers, where the mean may not be.
    loads = tokens_per_expert
    direction = torch.sign(loads.sum(dim=-1, keepdim=True) - num_experts * loads)
    bias = expert_bias + update_rate * direction.to(expert_bias.dtype)
    return bias - bias.mean(dim=-1, keepdim=True)
