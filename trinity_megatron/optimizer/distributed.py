"""Muon on Megatron's distributed optimizer: state sharded evenly, matrices owned once.

Megatron's `DistributedOptimizer` does what it does for Adam: gradients are reduced to the shard of
each rank, fp32 masters and momentum exist there only, updated weights are gathered, both with
overlap where Megatron has it, in one or several optimizer instances, and checkpoints reshard.  Muon
then needs whole matrices: see `optimizer/ownership.py`.

Megatron's own `LayerWiseDistributedOptimizer` is not used: it gives whole parameters to ranks (a
stack of experts is one: 108 parts for 256 ranks in Trinity Large), pads every rank's shard to the
largest (2048 times the attention's QKV), knows no optimizer instances, and fails in fp32.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import megatron.core.optimizer as core_optimizer
import numpy as np
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from trinity_megatron.optimizer.exchange import Placement
from trinity_megatron.optimizer.muon import Muon, make_stack
from trinity_megatron.optimizer.ownership import (
    Assignment,
    Shard,
    Stack,
    assign_dense,
    hold_matrices,
    list_matrices,
    relieve,
)


class SkippingOptimizer(ChainedOptimizer):
    """A chain that skips a step as one where the gradient is NaN or infinite.

    The gradient norm is of all ranks, so all of them skip.
    """

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        self._grad_norm = super().get_grad_norm()
        return self._grad_norm

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        if not math.isfinite(self._grad_norm):
            return False
        return bool(super().step_with_ready_grads())


class ShardedMuonOptimizer(SkippingOptimizer):
    """The chain of distributed optimizers; weights are gathered once, after all of them."""

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        for optimizer in self.chained_optimizers:
            optimizer._defer_param_sync = True
        done = super().step_with_ready_grads()
        if done and not self.chained_optimizers[0].ddp_config.overlap_param_gather:
            for chunk in self.model_chunks:
                chunk.start_param_sync()
        return done


class MuonDistributedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer around `Muon`."""

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def _get_state_key_dtype(self, key: str) -> torch.dtype:
        return self.optimizer.momentum_dtype

    def state_dict(self) -> dict[str, Any]:
        """The groups; Megatron takes ``step`` from Adam's state, and Muon has none."""
        groups = self.optimizer.state_dict()["param_groups"]
        kept = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return {"optimizer": {"param_groups": [{**group, "step": 0} for group in kept]}}


def build_sharded(
    config: Any,
    model_chunks: list[Any],
    config_overrides: dict[Any, Any],
    make_muon: Callable[[list[dict[str, Any]]], Muon],
    *,
    use_gloo_process_groups: bool,
) -> ShardedMuonOptimizer:
    """Build the chain: Muon on dense matrices, Muon on experts, AdamW on the rest.

    Args:
        config: ``OptimizerConfig`` with ``use_distributed_optimizer``.
        model_chunks: Wrapped in Megatron's DDP.
        config_overrides: Megatron's overrides; those of Muon among them.
        make_muon: Makes the optimizer of parameter groups.
        use_gloo_process_groups: Whether Megatron made gloo groups, for checkpoints.

    Raises:
        ValueError: A buffer holds parameters of both optimizers.
    """
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        None, model_chunks, use_gloo_process_groups=use_gloo_process_groups
    )
    pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    instance = 0
    if groups["dp_cp_group"].size() > groups["intra_dp_cp_group"].size():
        instance = groups["inter_dist_opt_group"].rank()
    by_kind: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for group in core_optimizer._get_param_groups(model_chunks, config, config_overrides):
        kind = group.get("optimizer", "muon"), group["is_expert_parallel"]
        by_kind.setdefault(kind, []).append(group)
    parts: list[Any] = []
    for expert in (False, True):
        shared = {
            "model_chunks": model_chunks,
            "data_parallel_group": groups["intra_expt_dp_group" if expert else "intra_dp_cp_group"],
            "data_parallel_group_gloo": groups[
                "intra_expt_dp_group_gloo" if expert else "intra_dp_cp_group_gloo"
            ],
            "data_parallel_group_idx": groups[
                "expt_tp_pp_with_egtp_remat_group" if expert else "mp_group"
            ].rank(),
            "distributed_optimizer_instance_id": instance,
        }
        if by_kind.get(("muon", expert)):
            optimizer = make_muon(by_kind["muon", expert])
            part = MuonDistributedOptimizer(
                optimizer,
                config,
                None,
                lambda muon, config=None: muon.init_state(),
                per_model_buffers=_buffers(model_chunks, "muon", expert),
                **shared,
            )
            part.grad_stats_parallel_group = groups["intra_dist_opt_group"]
            part.tp_group = pg_collection.tp
            part.expert_tp_group = pg_collection.expt_tp
            parts.append(part)
        if by_kind.get(("adam", expert)):
            adam_config = copy.copy(config)
            adam_config.optimizer = "adam"
            part = core_optimizer._get_megatron_optimizer_based_on_param_groups(
                config=adam_config,
                param_groups=by_kind["adam", expert],
                per_model_buffers=_buffers(model_chunks, "adam", expert),
                model_parallel_group=groups["mp_group"],
                intra_dist_opt_group=groups["intra_dist_opt_group"],
                pg_collection=pg_collection,
                **shared,
            )
            part.config = config  # a chain wants one
            parts.append(part)
    place_matrices([p for p in parts if isinstance(p, MuonDistributedOptimizer)], pg_collection)
    return ShardedMuonOptimizer(parts)


def _buffers(model_chunks: list[Any], optimizer: str, expert: bool) -> dict[int, list[Any]]:
    """Buffers of one optimizer, by model chunk."""
    found: dict[int, list[Any]] = {}
    for number, chunk in enumerate(model_chunks):
        for buffer in chunk.expert_parallel_buffers if expert else chunk.buffers:
            owners = {
                "muon" if getattr(p, "is_managed_by_layer_wise_optimizer", False) else "adam"
                for p in buffer.params
            }
            if len(owners) > 1:
                raise ValueError(
                    "Muon and AdamW would share a gradient buffer; add separate_muon_buffers() to "
                    "the pre_wrap_hooks of the model"
                )
            if owners == {optimizer}:
                found.setdefault(number, []).append(buffer)
    return found


def place_matrices(
    optimizers: list[MuonDistributedOptimizer], pg_collection: ProcessGroupCollection
) -> None:
    """Tell every Muon how its matrices lie on the ranks and who owns which.

    Dense matrices are owned across all ranks of the pipeline stage, experts within their own
    expert-data-parallel group: no expert travels to another expert-parallel rank.

    Args:
        optimizers: Of dense parameters and of experts, either may be missing.
        pg_collection: Megatron's groups.
    """
    scenes = {}
    for part in optimizers:
        expert = not getattr(part.buffers[0].params[0], "allreduce", True)
        tp_group = pg_collection.expt_tp if expert else pg_collection.tp
        scenes[expert] = _Scene(part, tp_group)
    loads: np.ndarray | None = None
    experts, dense = scenes.get(True), scenes.get(False)
    held: Assignment | None = None
    if experts:
        held = hold_matrices(list_matrices(experts.stacks), len(experts.ranks))
    if dense:
        base = np.zeros(len(dense.ranks))
        if experts and held:
            # Which place in its expert group each rank of the dense group has.
            places: list[Any] = [None] * len(dense.ranks)
            torch.distributed.all_gather_object(places, experts.rank, group=dense.group)
            base = held.loads[places]
        assigned = assign_dense(list_matrices(dense.stacks), base)
        dense.place(assigned)
        loads = assigned.loads - base
    if experts and held:
        besides = np.zeros(len(experts.ranks))
        if dense and loads is not None:
            besides = np.array([loads[dense.ranks.index(rank)] for rank in experts.ranks])
        experts.place(relieve(held, besides))


class _Scene:
    """Parameters of one distributed optimizer on all ranks that hold parts of them."""

    def __init__(self, part: MuonDistributedOptimizer, tp_group: ProcessGroup) -> None:
        self.muon = part.optimizer
        tables = _shard_ranks(part.data_parallel_group, tp_group)
        self.ranks = sorted({rank for table in tables for rank in table})
        self.group = _group_of(self.ranks, part.data_parallel_group)
        self.rank = self.ranks.index(torch.distributed.get_rank())
        local = {id(p): shard for p, shard in _model_and_shard(part)}
        self.stacks: list[Stack] = []
        self.tensors: list[Tensor | None] = []
        self.device = part.buffers[0].grad_data.device
        for buffer in part.buffers:
            for param, (start, _, bucket) in buffer.param_index_map.items():
                bounds = shard_bounds(start, param.numel(), buffer.bucket_indices[bucket], tables)
                holders = tuple(
                    tuple(Shard(self.ranks.index(s.rank), s.start, s.stop) for s in shards)
                    for shards in bounds
                )
                self.stacks.append(make_stack(param, param.shape, holders))
                self.tensors.append(local.get(id(param)))

    def place(self, assignment: Assignment) -> None:
        self.muon.place(
            [Placement(self.stacks, self.tensors, assignment, self.device, self.group, self.rank)]
        )


def shard_bounds(
    start: int, numel: int, bucket: tuple[int, int], tables: list[list[int]]
) -> list[tuple[Shard, ...]]:
    """Who holds which elements of a parameter.

    Args:
        start: First element of the parameter in the buffer.
        numel: Its elements.
        bucket: First and last element of its bucket.
        tables: For each tensor-parallel rank, the ranks of its data-parallel shards.

    Returns:
        For each tensor-parallel rank, its shards, in order.
    """
    ranks = len(tables[0])
    size = (bucket[1] - bucket[0]) // ranks
    offset = start - bucket[0]
    numbers = range(offset // size, -(-(offset + numel) // size))
    return [
        tuple(
            Shard(table[n], max(n * size - offset, 0), min((n + 1) * size - offset, numel))
            for n in numbers
        )
        for table in tables
    ]


def _model_and_shard(part: MuonDistributedOptimizer) -> list[tuple[Tensor, Tensor]]:
    pairs = [
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        (part.model_fp32_groups, part.shard_fp32_groups),
    ]
    return [
        found
        for models, shards in pairs
        for model_group, shard_group in zip(models, shards, strict=True)
        for found in zip(model_group, shard_group, strict=True)
    ]


def _shard_ranks(data_parallel: ProcessGroup, tensor_parallel: ProcessGroup) -> list[list[int]]:
    """Global ranks of the shards of each tensor-parallel rank."""
    own = torch.distributed.get_process_group_ranks(data_parallel)
    tables: list[Any] = [None] * tensor_parallel.size()
    torch.distributed.all_gather_object(tables, own, group=tensor_parallel)
    return tables


def _group_of(ranks: list[int], data_parallel: ProcessGroup) -> ProcessGroup:
    """The group of these ranks; every rank of the world calls it, with its own ranks."""
    wanted: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(wanted, ranks)
    own = torch.distributed.get_process_group_ranks(data_parallel)
    if all(len(some) == len(own) for some in wanted):
        return data_parallel  # no tensor parallelism: Megatron has the group
    found = None
    for some in sorted({tuple(some) for some in wanted}):
        group = torch.distributed.new_group(list(some))
        if list(some) == ranks:
            found = group
    assert found is not None
    return found
