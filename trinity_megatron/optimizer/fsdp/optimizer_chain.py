"""The chain of optimizers over Megatron-FSDP's shards."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from trinity_megatron.optimizer.fsdp.managed_parameters import managed_parameters
from trinity_megatron.optimizer.fsdp.sharded_optimizer import FsdpOptimizer
from trinity_megatron.optimizer.muon import Muon
from trinity_megatron.optimizer.sharded.coordinator import coordinate
from trinity_megatron.optimizer.sharded.optimizer_chain import (
    KINDS,
    Kind,
    ShardedMuonOptimizer,
    groups_by_kind,
    instance_number,
    make_inner_optimizer,
)


class FsdpMuonOptimizer(ShardedMuonOptimizer):
    """The chain; weights are made of the masters once, after all of its optimizers."""

    @torch.no_grad()
    def step_all(self) -> bool:
        done = super().step_all()
        for chunk in self.model_chunks:
            chunk.param_and_grad_buffer.copy_main_weights_to_model_weights()
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()  # else `ShardedMuonOptimizer` does
        return done


def build_on_fsdp(
    config: Any,
    chunks: list[Any],
    config_overrides: dict[Any, Any] | None,
    make_muon: Callable[[list[dict[str, Any]]], Muon],
    *,
    use_gloo_process_groups: bool,
    timeout: timedelta,
) -> FsdpMuonOptimizer:
    """Build the chain: Muon on dense matrices, Muon on experts, AdamW on the rest.

    Args:
        config: ``OptimizerConfig``; its optimizer is muon or adam.
        chunks: Wrapped in Megatron's ``FullyShardedDataParallel``.
        config_overrides: Megatron's overrides; those of Muon among them.
        make_muon: Makes the optimizer of parameter groups.
        use_gloo_process_groups: Whether Megatron made gloo groups, for checkpoints.
        timeout: Of a process group that has to be made.

    Returns:
        Megatron's optimizer.
    """
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        None, chunks, use_gloo_process_groups=use_gloo_process_groups
    )
    model_parallel = ProcessGroupCollection.use_mpu_process_groups()
    for chunk in chunks:
        chunk.module._replace_param_with_raw_if_needed()
    managed = [each for chunk in chunks for each in managed_parameters(chunk)]
    shards_replicas = chunks[0].megatron_fsdp_dist_index.hsdp_outer_dp_shard

    def build(kind: Kind, param_groups: list[dict[str, Any]]) -> FsdpOptimizer:
        inner, init_state = make_inner_optimizer(kind, param_groups, config, chunks, make_muon)
        part = FsdpOptimizer(
            inner,
            config,
            init_state,
            chunks=chunks,
            managed=managed,
            instance=0 if shards_replicas else instance_number(groups),
            shards_replicas=shards_replicas,
        )
        part.is_expert = kind.is_expert
        # What is not sharded over the replicas, each of them has whole.
        world = torch.distributed.group.WORLD
        norm_group = world if shards_replicas else groups["intra_dist_opt_group"]
        part.grad_stats_parallel_group = norm_group
        part.tp_group, part.expert_tp_group = model_parallel.tp, model_parallel.expt_tp
        part.data_parallel_group = chunks[0].megatron_fsdp_dist_index.get_dp_group(kind.is_expert)
        return part

    by_kind = groups_by_kind(chunks, config, config_overrides)
    parts = [build(kind, by_kind[kind]) for kind in KINDS if kind in by_kind]
    muons = [part for part in parts if isinstance(part.optimizer, Muon)]
    return FsdpMuonOptimizer(parts, coordinate(muons, model_parallel, timeout))
