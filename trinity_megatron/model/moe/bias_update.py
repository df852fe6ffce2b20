"""When the expert bias moves: once per successful optimizer step, for all layers at once.

    counters of all routers -> one all-reduce -> pending  (finalize_model_grads, after backward)
    pending -> pure bias rule -> committed                (the optimizer has stepped)

A step that is skipped (Inf, NaN, a spike) or run again leaves its counts pending, and the next
finalize replaces them: bias and momentum stay as if the step had not been.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import (
    finalize_model_grads as megatron_finalize_model_grads,
)
from megatron.core.parallel_state import get_tensor_and_data_parallel_group
from torch.optim.optimizer import register_optimizer_step_post_hook

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.moe.expert_bias import BIAS_RULES, scheduled_rate
from trinity_megatron.model.moe.router import TrinityRouter


@dataclass(frozen=True)
class BiasUpdate:
    """What one committed update did on this rank's layers.

    Attributes:
        layer_numbers: 1-based numbers of this rank's MoE layers.
        tokens_per_expert: Global counts of the step, int64 ``[num_layers, num_experts]``.
        expert_bias: Bias after the update, fp32, same shape.
        bias_momentum: Momentum after the update, fp32, same shape.
    """

    layer_numbers: tuple[int, ...]
    tokens_per_expert: torch.Tensor
    expert_bias: torch.Tensor
    bias_momentum: torch.Tensor


class _Pending:
    """Counts between the backward pass and the optimizer step; observers of committed updates."""

    routers: Sequence[TrinityRouter] = ()
    tokens_per_expert: torch.Tensor | None = None
    hook: Any = None
    observers: list[Callable[[BiasUpdate], None]] = []
    # Number of the running step, from 1.  The training loop knows it; where nobody says it, the
    # schedule of the bias (which only our own entry has flags for) is over.
    current_step: Callable[[], int] = staticmethod(lambda: sys.maxsize)


def observe_bias_updates(observer: Callable[[BiasUpdate], None]) -> Callable[[], None]:
    """Call ``observer`` after every committed update, on every rank (also one without routers).

    Returns:
        A function that removes the observer.
    """
    _Pending.observers.append(observer)
    return lambda: _Pending.observers.remove(observer)


def set_step_source(current_step: Callable[[], int]) -> None:
    """Say where the number of the running optimizer step (from 1) comes from.

    The warm-up and the freezing of the bias follow it, also after a resume.
    """
    _Pending.current_step = staticmethod(current_step)


def finalize_model_grads(
    model: list[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool | None = False,
    **kwargs: Any,
) -> None:
    """Reduce the routing statistics, then do what Megatron does.

    Goes into ``config.finalize_model_grads_func``.

    Args:
        model: DDP-wrapped pipeline chunks of this rank.
        num_tokens: See Megatron.
        pg_collection: Process groups; Megatron's global ones if None.
        force_all_reduce: See Megatron.
        **kwargs: Passed on.
    """
    groups = pg_collection
    group = get_tensor_and_data_parallel_group(with_context_parallel=True)
    if groups is not None:
        group = groups.tp_dp_cp
    collect_counts(model, group)
    megatron_finalize_model_grads(
        model, num_tokens, pg_collection, force_all_reduce=force_all_reduce, **kwargs
    )


def find_routers(model: Sequence[torch.nn.Module]) -> list[TrinityRouter]:
    """Routers with an expert bias that are in training mode, in the order of the layers."""
    return [
        module
        for chunk in model
        for module in chunk.modules()
        if isinstance(module, TrinityRouter) and module.enable_expert_bias and module.training
    ]


@torch.no_grad()
def collect_counts(model: Sequence[torch.nn.Module], group: Any) -> None:
    """Sum the counters of all layers over ``group`` in one all-reduce; reset them; set pending.

    Args:
        model: Pipeline chunks of this rank.
        group: Tensor x context x data parallel group: every rank that saw other tokens.
    """
    routers = find_routers(model)
    counts = torch.zeros(0, 0, dtype=torch.int64)
    if routers:
        counts = torch.stack([router.local_tokens_per_expert for router in routers])
    for router in routers:
        router.local_tokens_per_expert.zero_()
    if routers and group.size() > 1:
        torch.distributed.all_reduce(counts, group=group)
    _Pending.routers, _Pending.tokens_per_expert = routers, counts
    if _Pending.hook is None:
        _Pending.hook = register_optimizer_step_post_hook(lambda *args: commit_bias_update())


@torch.no_grad()
def commit_bias_update() -> None:
    """Apply the pending counts, if any, to bias and momentum of all layers.

    Runs after the first inner optimizer's step: Megatron does not get there in a step it skips.
    """
    counts, routers = _Pending.tokens_per_expert, _Pending.routers
    if counts is None:
        return
    _Pending.tokens_per_expert, _Pending.routers = None, ()
    bias, momentum = torch.zeros(0, 0), torch.zeros(0, 0)
    if routers:
        bias, momentum = _apply_rule(routers, counts)
    numbers = tuple(int(router.layer_number or 0) for router in routers)
    for observer in _Pending.observers:
        observer(BiasUpdate(numbers, counts, bias, momentum))


def _apply_rule(
    routers: Sequence[TrinityRouter], counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    config: TrinityConfig = routers[0].config
    bias = torch.stack([router.expert_bias for router in routers])
    momentum = torch.stack([router.expert_bias_momentum for router in routers])
    step, last = _Pending.current_step(), config.moe_router_bias_freeze_step
    if last is not None and step > last:
        return bias, momentum
    bias, momentum = BIAS_RULES[config.moe_router_bias_update_rule](
        bias,
        momentum,
        counts,
        update_rate=scheduled_rate(
            config.moe_router_bias_update_rate,
            step=step,
            warmup_steps=config.moe_router_bias_warmup_steps,
        ),
        momentum=config.bias_momentum,
        clamp_scale=config.moe_router_bias_clamp_scale,
    )
    for index, router in enumerate(routers):
        router.expert_bias.copy_(bias[index])
        router.expert_bias_momentum.copy_(momentum[index])
    return bias, momentum
