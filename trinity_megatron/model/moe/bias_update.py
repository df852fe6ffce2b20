"""Update of the expert bias: once per successful optimizer step, for all layers at once.

    counters of all routers -> one all-reduce -> pending  (finalize_model_grads, after backward)
    pending -> pure bias rule -> committed                (the optimizer has stepped)

A step that is skipped (Inf, NaN, a spike) or run again leaves its counts pending, and the next
finalize replaces them: bias and momentum stay as if the step had not been.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import (
    finalize_model_grads as megatron_finalize_model_grads,
)
from megatron.core.parallel_state import get_tensor_and_data_parallel_group
from megatron.core.utils import unwrap_model
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


def find_routers(model: Sequence[torch.nn.Module]) -> list[TrinityRouter]:
    """Routers with an expert bias that are in training mode, in the order of the layers."""
    return [
        module
        for chunk in model
        for module in chunk.modules()
        if isinstance(module, TrinityRouter) and module.enable_expert_bias and module.training
    ]


class ExpertBiasUpdater:
    """Updates the expert bias of one model after the steps of that model's optimizer.

    Attributes:
        current_step: Returns the number of the running optimizer step, from 1.  The schedule of
            the bias (warm-up, freezing) follows it; defaults to ``sys.maxsize``, i.e. after
            warm-up.
        observers: Called after every committed update, on every rank, also one without routers.
    """

    def __init__(self) -> None:
        self.current_step: Callable[[], int] = lambda: sys.maxsize
        self.observers: list[Callable[[BiasUpdate], None]] = []
        self._routers: Sequence[TrinityRouter] = ()
        self._tokens_per_expert: torch.Tensor | None = None
        self._followed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._follows_any = False

    @torch.no_grad()
    def collect(self, model: Sequence[torch.nn.Module], group: Any) -> None:
        """Sum the counters of all layers over ``group`` in one all-reduce; reset them.

        The sums are pending until the model's optimizer has stepped.

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
        self._routers, self._tokens_per_expert = routers, counts
        self._follow_optimizer(model)

    @torch.no_grad()
    def commit(self) -> None:
        """Apply the pending counts, if any, to bias and momentum of all layers.

        Runs after the first inner optimizer's step: Megatron does not get there in a step it skips.
        """
        counts, routers = self._tokens_per_expert, self._routers
        if counts is None:
            return
        self._tokens_per_expert, self._routers = None, ()
        bias, momentum = torch.zeros(0, 0), torch.zeros(0, 0)
        if routers:
            bias, momentum = _apply_rule(routers, counts, self.current_step())
        numbers = tuple(int(router.layer_number or 0) for router in routers)
        for observer in self.observers:
            observer(BiasUpdate(numbers, counts, bias, momentum))

    def _follow_optimizer(self, model: Sequence[torch.nn.Module]) -> None:
        """Commit after the steps of the optimizer that trains the model."""
        # Megatron's training loop sets it to a method of the optimizer.
        config = getattr(unwrap_model(model[0]), "config", None)
        scale = getattr(config, "grad_scale_func", None)
        optimizer = getattr(scale, "__self__", None)
        if optimizer is None:
            if not self._follows_any:
                self._follow_any(model)
            return
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            inner = getattr(part, "optimizer", None)
            if inner is not None and inner not in self._followed:
                inner.register_step_post_hook(lambda *args: self.commit())
                self._followed.add(inner)

    def _follow_any(self, model: Sequence[torch.nn.Module]) -> None:
        """Commit after the steps of any optimizer that holds parameters of the model.

        For training loops that do not set ``grad_scale_func``.
        """
        self._follows_any = True
        chunks = [weakref.ref(chunk) for chunk in model]
        updater = weakref.ref(self)

        def hook(optimizer: torch.optim.Optimizer, *args: Any) -> None:
            this, alive = updater(), [chunk for ref in chunks if (chunk := ref())]
            is_pending = this is not None and this._tokens_per_expert is not None
            if this is not None and is_pending and _trains(optimizer, alive):
                this.commit()

        weakref.finalize(self, register_optimizer_step_post_hook(hook).remove)


def get_expert_bias_updater(model: Sequence[torch.nn.Module]) -> ExpertBiasUpdater:
    """The updater of a model; made when first asked for.

    Args:
        model: Pipeline chunks of this rank, wrapped or not.
    """
    first: Any = unwrap_model(model[0])
    if "expert_bias_updater" not in first.__dict__:
        first.__dict__["expert_bias_updater"] = ExpertBiasUpdater()
    return first.__dict__["expert_bias_updater"]


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
    get_expert_bias_updater(model).collect(model, group)
    megatron_finalize_model_grads(
        model, num_tokens, pg_collection, force_all_reduce=force_all_reduce, **kwargs
    )


def _trains(optimizer: torch.optim.Optimizer, model: Sequence[torch.nn.Module]) -> bool:
    held = {param for group in optimizer.param_groups for param in group["params"]}
    return any(param in held for param in _params_and_masters(model))


def _params_and_masters(model: Sequence[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for chunk in model:
        for param in chunk.parameters():
            yield param
            if (master := getattr(param, "main_param", None)) is not None:
                yield master


def _apply_rule(
    routers: Sequence[TrinityRouter], counts: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    config: TrinityConfig = routers[0].config
    bias = torch.stack([router.expert_bias for router in routers])
    momentum = torch.stack([router.expert_bias_momentum for router in routers])
    last = config.moe_router_bias_freeze_step
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
