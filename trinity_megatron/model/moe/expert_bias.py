"""The rules that move the expert bias: the report's equations as pure functions.

``n_i`` is the number of tokens that expert i received in the step over the global batch, and
``nbar`` their mean over the experts of the layer.  All rules have one signature, so that
:data:`BIAS_RULES` can be indexed by name.
"""

from collections.abc import Callable

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
    violation = _normalized_violation(tokens_per_expert, expert_bias.dtype)
    delta = update_rate * torch.tanh(clamp_scale * violation)
    return _move(expert_bias, bias_momentum, delta, momentum)


def linear_update(
    expert_bias: torch.Tensor,
    bias_momentum: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    *,
    update_rate: float,
    momentum: float,
    clamp_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""SMEBU without its clamp: :math:`\Delta_i = \lambda \kappa v_i`, which is centred by itself.

    The report tried an unclamped linear update and found it fast early and unstable later; it is
    here for comparison.  Arguments and result as :func:`smebu_update`.

    Source: report section 2.2 (the rationale of the clamp).
    """
    violation = _normalized_violation(tokens_per_expert, expert_bias.dtype)
    return _move(expert_bias, bias_momentum, update_rate * clamp_scale * violation, momentum)


def sign_update(
    expert_bias: torch.Tensor,
    bias_momentum: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    *,
    update_rate: float,
    momentum: float = 0.0,
    clamp_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The sign rule with recentring.

    .. math:: b_i \leftarrow b_i + \gamma \, \mathrm{sign}(\bar n - n_i), \qquad
        b \leftarrow b - \mathrm{mean}(b)

    Args:
        expert_bias: b, fp32 (fp64 in tests), ``[..., num_experts]``.
        bias_momentum: m, same shape and dtype.
        tokens_per_expert: n, any integer or floating dtype, same shape.
        update_rate: gamma.
        momentum: beta; the report's rule has none, with it the step is averaged as in SMEBU.
        clamp_scale: Without meaning here.

    Returns:
        New bias, with mean zero, and new momentum.

    Source: report eq 19-22.
    """
    num_experts = tokens_per_expert.shape[-1]
    # sign(nbar - n) = sign(sum(n) - N n): exact in integers, where the mean may not be.
    loads = tokens_per_expert
    direction = torch.sign(loads.sum(dim=-1, keepdim=True) - num_experts * loads)
    delta = update_rate * direction.to(expert_bias.dtype)
    new_momentum = momentum * bias_momentum + (1.0 - momentum) * delta
    bias = expert_bias + new_momentum
    return bias - bias.mean(dim=-1, keepdim=True), new_momentum


def no_update(
    expert_bias: torch.Tensor, bias_momentum: torch.Tensor, *args: object, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias stays as it is."""
    return expert_bias, bias_momentum


BIAS_RULES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "smebu": smebu_update,
    "sign": sign_update,
    "linear": linear_update,
    "none": no_update,
}
# Momentum of a rule where the user gives none: SMEBU's is that of the Large run.
DEFAULT_MOMENTUM = {"smebu": 0.5, "sign": 0.0, "linear": 0.0, "none": 0.0}


def scheduled_rate(update_rate: float, *, step: int, warmup_steps: int) -> float:
    """Update rate of a step: it rises linearly over the first steps.

    Args:
        update_rate: Rate after the warm-up.
        step: Optimizer step, from 1.
        warmup_steps: Steps until the full rate; 0 for none.
    """
    return update_rate * min(1.0, step / warmup_steps) if warmup_steps else update_rate


def _normalized_violation(tokens_per_expert: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(nbar - n) / nbar``, ``[..., num_experts]``; 0 for a layer without tokens."""
    loads = tokens_per_expert.to(dtype)
    mean_load = loads.mean(dim=-1, keepdim=True)
    # No token: n = nbar = 0, the violation is 0 and not 0/0.
    return (mean_load - loads) / mean_load.clamp_min(torch.finfo(loads.dtype).tiny)


def _move(
    expert_bias: torch.Tensor, bias_momentum: torch.Tensor, delta: torch.Tensor, momentum: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre the step, average it, add it."""
    delta = delta - delta.mean(dim=-1, keepdim=True)
    new_momentum = momentum * bias_momentum + (1.0 - momentum) * delta
    return expert_bias + new_momentum, new_momentum
