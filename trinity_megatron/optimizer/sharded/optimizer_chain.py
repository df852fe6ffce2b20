"""The chain of distributed optimizers: Muon on dense matrices and on experts, AdamW on the rest.

Muon needs whole matrices, which the ranks of the distributed optimizers hold in parts: see
`sharded/ownership.py` for who orthogonalizes which.

Megatron's own `LayerWiseDistributedOptimizer` is not used: it gives whole parameters to ranks (a
stack of experts is one: 108 parts for 256 ranks in Trinity Large), pads every rank's shard to the
largest (2048 times the attention's QKV), knows no optimizer instances, and fails in fp32.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple, Protocol

import megatron.core.optimizer as core_optimizer
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from trinity_megatron.optimizer.muon import Muon
from trinity_megatron.optimizer.sharded.coordinator import MuonCoordinator, coordinate
from trinity_megatron.optimizer.sharded.distributed_optimizer import ShardedOptimizer


class StepJudge(Protocol):
    """Decides before the update whether a step is skipped, on all ranks alike."""

    def begin(self) -> None:
        """Run after the backward pass, before the gradient norm is read."""

    def should_skip(self, grad_norm: float) -> bool:
        """Whether to leave weights and states as they are.

        Args:
            grad_norm: Of all ranks, before clipping.
        """


class SkippingOptimizer(ChainedOptimizer):
    """A chain that skips a step as one where the gradient is NaN or infinite, or a judge says so.

    The gradient norm is of all ranks, so all of them skip.

    Attributes:
        judge: Asked before each update; None: skip NaN and infinity only.
    """

    judge: StepJudge | None = None

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        if self.judge is not None:
            self.judge.begin()
        return super().prepare_grads()

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        parts = self.chained_optimizers
        if len(parts) > 1 and not self.grads_states_parallel_group_is_shared():
            norms = [part.get_grad_norm() for part in parts]
            if any(isinstance(norm, torch.Tensor) for norm in norms):
                self._grad_norm = _norm_of_norms(norms)
                return self._grad_norm
            self._grad_norm = math.sqrt(sum(norm**2 for norm in norms if norm))
        else:
            self._grad_norm = float(super().get_grad_norm())
        return self._grad_norm

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        if self.judge is not None and self.judge.should_skip(self._grad_norm):
            return False
        if not math.isfinite(self._grad_norm):
            return False
        return self.step_all()

    def step_all(self) -> bool:
        """Step all optimizers of the chain, with gradients known to be finite."""
        return bool(super().step_with_ready_grads())


def _norm_of_norms(norms: list[float | torch.Tensor]) -> float:
    """Read once from the device, where some of them are."""
    device = next(norm.device for norm in norms if isinstance(norm, torch.Tensor))
    values = [torch.as_tensor(norm, dtype=torch.float32, device=device).view(()) for norm in norms]
    return float(torch.linalg.vector_norm(torch.stack(values)))


class ShardedMuonOptimizer(SkippingOptimizer):
    """The chain of distributed optimizers; weights are gathered once, after all of them.

    Args:
        parts: Megatron's optimizers, in the order of their steps.
        coordinator: Of those around a `Muon`.
    """

    def __init__(self, parts: list[ShardedOptimizer], coordinator: MuonCoordinator) -> None:
        super().__init__(parts)
        self.coordinator = coordinator

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        for optimizer in self.chained_optimizers:
            optimizer._defer_param_sync = True
        done = super().step_with_ready_grads()
        for chunk in self.model_chunks:
            if done and not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()
        return done

    def step_all(self) -> bool:
        """Start the steps of every Muon, then step the optimizers one after the other."""
        self.coordinator.start_steps()
        return super().step_all()


class Kind(NamedTuple):
    """What the parameters of one distributed optimizer have in common."""

    optimizer: Literal["muon", "adam"]
    is_expert: bool


# In the order of their steps.
KINDS = (
    Kind("muon", is_expert=False),
    Kind("adam", is_expert=False),
    Kind("muon", is_expert=True),
    Kind("adam", is_expert=True),
)


def build_sharded(
    config: Any,
    model_chunks: list[Any],
    config_overrides: dict[Any, Any],
    make_muon: Callable[[list[dict[str, Any]]], Muon],
    *,
    use_gloo_process_groups: bool,
    timeout: timedelta,
) -> ShardedMuonOptimizer:
    """Build the chain: Muon on dense matrices, Muon on experts, AdamW on the rest.

    Args:
        config: ``OptimizerConfig`` with ``use_distributed_optimizer``.
        model_chunks: Wrapped in Megatron's DDP.
        config_overrides: Megatron's overrides; those of Muon among them.
        make_muon: Makes the optimizer of parameter groups.
        use_gloo_process_groups: Whether Megatron made gloo groups, for checkpoints.
        timeout: Of the group of all ranks that share the work.

    Returns:
        Megatron's optimizer.

    Raises:
        ValueError: A buffer holds parameters of both optimizers.
    """
    build = _PartBuilder(
        config,
        model_chunks,
        make_muon,
        ProcessGroupCollection.setup_process_groups_for_optimizer(
            None, model_chunks, use_gloo_process_groups=use_gloo_process_groups
        ),
        ProcessGroupCollection.use_mpu_process_groups(),
    )
    param_groups = groups_by_kind(model_chunks, config, config_overrides)
    parts = [build(kind, param_groups[kind]) for kind in KINDS if kind in param_groups]
    muons = [part for part in parts if isinstance(part.optimizer, Muon)]
    return ShardedMuonOptimizer(parts, coordinate(muons, build.pg_collection, timeout))


def groups_by_kind(
    model_chunks: list[Any], config: Any, config_overrides: dict[Any, Any] | None
) -> dict[Kind, list[dict[str, Any]]]:
    """Megatron's parameter groups by the optimizer that gets them; arguments of `build_sharded`."""
    found: dict[Kind, list[dict[str, Any]]] = {}
    for group in core_optimizer._get_param_groups(model_chunks, config, config_overrides):
        kind = Kind(group.get("optimizer", config.optimizer), group["is_expert_parallel"])
        found.setdefault(kind, []).append(group)
    return found


@dataclass(frozen=True)
class _PartBuilder:
    """Builds the distributed optimizers of one chain.

    Attributes:
        config: ``OptimizerConfig``.
        model_chunks: Wrapped in Megatron's DDP.
        make_muon: Makes the optimizer of parameter groups.
        groups: Of Megatron's ``setup_process_groups_for_optimizer``, by name.
        pg_collection: Megatron's tensor-, pipeline- and expert-parallel groups.
    """

    config: Any
    model_chunks: list[Any]
    make_muon: Callable[[list[dict[str, Any]]], Muon]
    groups: dict[str, Any]
    pg_collection: ProcessGroupCollection

    def __call__(self, kind: Kind, param_groups: list[dict[str, Any]]) -> ShardedOptimizer:
        """Build the optimizer of the parameters of one kind."""
        optimizer, init_state = make_inner_optimizer(
            kind, param_groups, self.config, self.model_chunks, self.make_muon
        )
        data_parallel = "intra_expt_dp_group" if kind.is_expert else "intra_dp_cp_group"
        model_parallel = "expt_tp_pp_with_egtp_remat_group" if kind.is_expert else "mp_group"
        part = ShardedOptimizer(
            optimizer,
            self.config,
            None,
            init_state,
            per_model_buffers=_buffers(self.model_chunks, kind),
            model_chunks=self.model_chunks,
            data_parallel_group=self.groups[data_parallel],
            data_parallel_group_gloo=self.groups[f"{data_parallel}_gloo"],
            data_parallel_group_idx=self.groups[model_parallel].rank(),
            distributed_optimizer_instance_id=instance_number(self.groups),
        )
        part.is_expert = kind.is_expert
        part.grad_stats_parallel_group = self.groups["intra_dist_opt_group"]
        part.tp_group = self.pg_collection.tp
        part.expert_tp_group = self.pg_collection.expt_tp
        return part


def make_inner_optimizer(
    kind: Kind,
    param_groups: list[dict[str, Any]],
    config: Any,
    model_chunks: list[Any],
    make_muon: Callable[[list[dict[str, Any]]], Muon],
) -> tuple[torch.optim.Optimizer, Callable[..., None]]:
    """The torch optimizer, and what makes its state, as Megatron's own builder returns them."""
    if kind.optimizer == "muon":
        return make_muon(param_groups), init_muon_state
    config = copy.copy(config)
    config.optimizer = "adam"
    return core_optimizer._get_megatron_optimizer_based_on_param_groups(
        config, model_chunks, param_groups, skip_megatron_wrapping=True
    )


def instance_number(groups: dict[str, Any]) -> int:
    """Number of the optimizer instance that this rank belongs to.

    Args:
        groups: Of Megatron's ``setup_process_groups_for_optimizer``.
    """
    if groups["dp_cp_group"].size() > groups["intra_dp_cp_group"].size():
        return int(groups["inter_dist_opt_group"].rank())
    return 0


def init_muon_state(optimizer: Muon, config: Any = None) -> None:
    """Make the state of all parameters, as Megatron's ``init_state_fn`` does before a load."""
    optimizer.init_state()


def _buffers(model_chunks: list[Any], kind: Kind) -> dict[int, list[Any]]:
    """Buffers of one optimizer, by model chunk."""
    found: dict[int, list[Any]] = {}
    for number, chunk in enumerate(model_chunks):
        for buffer in chunk.expert_parallel_buffers if kind.is_expert else chunk.buffers:
            owners = {
                "muon" if getattr(p, "is_managed_by_layer_wise_optimizer", False) else "adam"
                for p in buffer.params
            }
            if len(owners) > 1:
                raise ValueError(
                    "Muon and AdamW would share a gradient buffer; add separate_muon_buffers() to "
                    "the pre_wrap_hooks of the model"
                )
            if owners == {kind.optimizer}:
                found.setdefault(number, []).append(buffer)
    return found
