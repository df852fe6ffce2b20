"""What Muon will do on every rank of a sharded run, computed without a cluster.

    python -m trinity_megatron.planner.fsdp_work --preset large --world-size 2048 --replicas 16 \
        --expert-model-parallel-size 8

Buckets come from Megatron-FSDP's own functions, owners from those that a training uses.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
    BucketingPolicy,
    _get_parameter_groups,
    build_data_parallel_buffer_index,
)
from torch.nn import Module, Parameter

from trinity_megatron.errors import UserError
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.optimizer.matrix_split import make_stack
from trinity_megatron.optimizer.param_groups import attach_muon_splits, is_adam_parameter
from trinity_megatron.optimizer.sharded.buffer_layout import shard_bounds
from trinity_megatron.optimizer.sharded.ownership import Stack
from trinity_megatron.planner.muon_work import MuonPlan, add_state, own_all, stage_parameters


class _Unit(Module):
    """A layer: what Megatron-FSDP gathers at once."""


def plan_sharded_muon(
    config: TrinityConfig,
    vocab_size: int,
    *,
    world_size: int,
    replicas: int = 1,
    expert_parallel: int = 1,
) -> MuonPlan:
    """Plan a step of Muon on Megatron-FSDP's shards.

    Args:
        config: The model.
        vocab_size: Rows of the embedding.
        world_size: Ranks; no tensor, pipeline or context parallelism.
        replicas: Of the shards, ``--num-distributed-optimizer-instances``.
        expert_parallel: Expert-parallel size.

    Raises:
        UserError: The sizes do not divide each other.
    """
    if world_size % (replicas * expert_parallel):
        raise UserError(
            f"world_size={world_size} is no multiple of replicas={replicas} times "
            f"expert_parallel={expert_parallel}"
        )
    root = _build_tree(config, vocab_size, expert_parallel)
    attach_muon_splits(root.named_parameters(), config)
    dense: list[Stack] = []
    experts: list[Stack] = []
    state = np.zeros(world_size)
    for name, param, stack, is_expert in _stacks(root, world_size, replicas, expert_parallel):
        is_muon = not is_adam_parameter(param, name)
        add_state(state, stack, is_muon, expert_parallel if is_expert else 1)
        if is_muon:
            (experts if is_expert else dense).append(stack)
    return own_all(dense, experts, state, expert_parallel=expert_parallel, experts_stay=True)


def _build_tree(config: TrinityConfig, vocab_size: int, expert_parallel: int) -> Module:
    """The parameters of the model, without data, in modules of their names."""
    root = Module()
    layers = range(config.num_layers)
    for name, param in stage_parameters(config, vocab_size, layers, True, True, expert_parallel):
        *path, leaf = name.split(".")
        owner = root
        for depth, part in enumerate(path):
            if part not in owner._modules:
                is_layer = depth == 2 and path[:2] == ["decoder", "layers"]
                owner.add_module(part, _Unit() if is_layer else Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        owner.register_parameter(leaf, param)
    return root


def _stacks(
    root: Module, world_size: int, replicas: int, expert_parallel: int
) -> Iterator[tuple[str, Parameter, Stack, bool]]:
    """Every parameter with the ranks of its shards: numbers of the world, of experts the places."""
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, data_parallel_sharding_strategy="optim_grads_params"
    )
    policy = BucketingPolicy(
        suggested_bucket_size=40_000_000,
        fsdp_unit_modules=[_Unit],
        data_parallel_sharding_strategy="optim_grads_params",
    )
    names = {param: name for name, param in root.named_parameters()}
    groups, _, _ = _get_parameter_groups(root, policy, {})
    for group in groups:
        ranks = world_size // (expert_parallel if group.is_expert_param else 1)
        inner = ranks // replicas
        items, bucket, _ = build_data_parallel_buffer_index(
            [param.shape for param in group.params],
            0,
            inner,
            True,
            config,
            chunk_size_factor=group.chunk_size_factor,
        )
        tables = [list(range(first, first + inner)) for first in range(0, ranks, inner)]
        for item, param in enumerate(group.params):
            start = items[item].global_data_index
            holders = shard_bounds(start, param.numel(), (0, bucket.size), tables)
            shape = param.shape if param.dim() > 1 else (1, *param.shape)
            stack = make_stack(param, shape, holders, are_replicas=True)
            yield names[param], param, stack, group.is_expert_param


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of a preset."""
    from trinity_megatron.model.presets import get_preset, trinity_preset

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="large")
    parser.add_argument("--world-size", type=int, default=2048)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--expert-model-parallel-size", type=int, default=8)
    args = parser.parse_args(argv)
    config: Any = trinity_preset(args.preset)
    plan = plan_sharded_muon(
        config,
        get_preset(args.preset).model["vocab_size"],
        world_size=args.world_size,
        replicas=args.replicas,
        expert_parallel=args.expert_model_parallel_size,
    )
    print(plan)


if __name__ == "__main__":
    main()
