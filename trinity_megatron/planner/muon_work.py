"""What Muon will do and hold on every rank of a cluster, computed without one.

    python -m trinity_megatron.planner.muon_work --preset large --world-size 2048 \
        --expert-model-parallel-size 8 --pipeline-model-parallel-size 8

The layout of the buffers and the owners come from the functions that a training uses.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from trinity_megatron.errors import UserError
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.optimizer.matrix_split import make_stack
from trinity_megatron.optimizer.param_groups import attach_muon_splits
from trinity_megatron.optimizer.sharded.buffer_layout import (
    aligned_expert_buffers,
    shard_bounds,
    tag_for_buffers,
)
from trinity_megatron.optimizer.sharded.ownership import Assignment, Stack, own_dense, relieve
from trinity_megatron.planner.shapes import stage_shapes

# fp32 master weight with momentum, or with both of Adam's moments.
_MUON_BYTES, _ADAM_BYTES = 8, 12
_WIRE_BYTES = 2  # bfloat16 travels


@dataclass(frozen=True)
class MuonPlan:
    """Work, memory and traffic of a step, for every rank.

    Attributes:
        flops: Floating point operations of Newton-Schulz, ``[world]``.
        state_bytes: Master weights, momentum and AdamW's moments, ``[world]``.
        sent_bytes: Pieces of cut matrices that leave a rank, to owners and back, ``[world]``.
        mean_state_bytes: The state of the model, evenly divided.
    """

    flops: np.ndarray
    state_bytes: np.ndarray
    sent_bytes: np.ndarray
    mean_state_bytes: float

    @property
    def balance(self) -> float:
        """Work of the busiest rank, relative to the mean."""
        return float(self.flops.max() / self.flops.mean())

    def __str__(self) -> str:
        return (
            f"{len(self.flops)} ranks: Newton-Schulz {self.flops.mean() / 1e12:.2f} TFLOP a rank, "
            f"{self.balance:.3f} times that on the busiest; optimizer state "
            f"{self.mean_state_bytes / 1e9:.3f} GB a rank, {self.state_bytes.max() / 1e9:.3f} GB "
            f"on the fullest; {self.sent_bytes.mean() / 1e6:.1f} MB sent a rank, "
            f"{self.sent_bytes.max() / 1e6:.1f} MB by the one that sends most"
        )


def plan_muon(
    config: TrinityConfig,
    vocab_size: int,
    *,
    world_size: int,
    expert_parallel: int = 1,
    stages: Sequence[Sequence[int]] | None = None,
    bucket_size: int | None = None,
) -> MuonPlan:
    """Plan a step of Muon with the distributed optimizer.

    Args:
        config: The model.
        vocab_size: Rows of the embedding.
        world_size: Ranks; no tensor or context parallelism.
        expert_parallel: Expert-parallel size.
        stages: Layers (from 0) of each pipeline stage; default: one stage.
        bucket_size: Elements of a bucket of gradients; default: Megatron's with
            ``--overlap-grad-reduce``.

    Raises:
        UserError: The sizes do not divide each other.
    """
    stages = stages or [range(config.num_layers)]
    per_stage = world_size // len(stages)
    if per_stage * len(stages) != world_size or per_stage % expert_parallel:
        raise UserError(
            f"world_size={world_size} is no multiple of {len(stages)} pipeline stages times "
            f"expert_parallel={expert_parallel}"
        )
    if config.num_moe_experts % expert_parallel:
        raise UserError(
            f"num_moe_experts={config.num_moe_experts} is no multiple of "
            f"expert_parallel={expert_parallel}"
        )
    bucket_size = bucket_size or max(40_000_000, 1_000_000 * per_stage)
    with aligned_expert_buffers():
        return _plan_stages(config, vocab_size, world_size, expert_parallel, stages, bucket_size)


def _plan_stages(
    config: TrinityConfig,
    vocab_size: int,
    world_size: int,
    expert_parallel: int,
    stages: Sequence[Sequence[int]],
    bucket_size: int,
) -> MuonPlan:
    per_stage = world_size // len(stages)
    dense: list[Stack] = []
    experts: list[Stack] = []
    state = np.zeros(world_size)
    for number, layers in enumerate(stages):
        ends = (number == 0, number == len(stages) - 1)
        named = list(stage_parameters(config, vocab_size, layers, *ends, expert_parallel))
        attach_muon_splits(named, config)
        tag_for_buffers(named, config)
        first = number * per_stage
        for found, is_muon, is_expert in _stacks(
            [param for _, param in named],
            per_stage,
            expert_parallel,
            bucket_size if number == 0 else None,  # Megatron: later stages have one bucket
        ):
            for stack in found:
                add_state(state, stack, is_muon, expert_parallel if is_expert else 1, first=first)
            if is_muon and is_expert:  # of expert-parallel rank 0; places count over the stages
                places = {p: p + number * (per_stage // expert_parallel) for p in range(per_stage)}
                experts += [stack.renumbered(places) for stack in found]
            elif is_muon:
                places = {p: p + first for p in range(per_stage)}
                dense += [stack.renumbered(places) for stack in found]
    return own_all(dense, experts, state, expert_parallel=expert_parallel)


def stage_parameters(
    config: TrinityConfig,
    vocab_size: int,
    layers: Sequence[int],
    is_first: bool,
    is_last: bool,
    expert_parallel: int,
) -> Iterator[tuple[str, Parameter]]:
    """Yield names and parameters of a pipeline stage, in the order of the model, without data."""
    for item in stage_shapes(config, vocab_size, layers, is_first, is_last, expert_parallel):
        param = Parameter(torch.empty(item.shape, device="meta", dtype=torch.bfloat16))
        param.allreduce = not item.is_expert  # type: ignore[attr-defined]
        yield item.name, param


def even_stages(num_layers: int, count: int) -> list[range]:
    """Divide the layers over the stages in order; the first and the last have fewest."""
    sizes = [num_layers // count] * count
    for number in range(num_layers % count):
        sizes[(number + (count - num_layers % count + 1) // 2) % count] += 1
    starts = np.cumsum([0, *sizes])
    return [range(int(a), int(b)) for a, b in zip(starts, starts[1:], strict=False)]


def _stacks(
    params: list[Parameter], ranks: int, expert_parallel: int, bucket_size: int | None
) -> Iterator[tuple[list[Stack], bool, bool]]:
    """Lay out the buffers of a stage: stacks, whether of Muon, whether of experts."""
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    for key, (members, _) in group_params_for_buffers(params, True).items():
        count = ranks // expert_parallel if key.is_expert_parallel else ranks
        layout = DistributedOptimizer._compute_per_buffer_param_layout(
            members, bucket_size, count, ddp_config
        )
        table = [list(range(count))]
        stacks = []
        for param, (start, _, bucket) in layout.param_index_map.items():
            bounds = shard_bounds(start, param.numel(), layout.bucket_indices[bucket], table)
            matrix: Tensor = param if param.dim() > 1 else param.unsqueeze(0)
            stacks.append(make_stack(param, matrix.shape, bounds))
        yield stacks, key.is_managed_by_layer_wise_optimizer, key.is_expert_parallel


def add_state(
    state: np.ndarray, stack: Stack, is_muon: bool, expert_parallel: int, *, first: int = 0
) -> None:
    """Add the optimizer's state of a parameter, on all ranks that hold a part of it.

    Args:
        state: Bytes, ``[world]``; changed in place.
        stack: With ranks, or with places among the expert-data-parallel ranks.
        is_muon: Whether Muon updates it; else AdamW.
        expert_parallel: Ranks of a place; 1 for dense parameters.
        first: First rank of the stage.
    """
    for shards in stack.holders:
        for shard in shards:
            size = (shard.stop - shard.start) * (_MUON_BYTES if is_muon else _ADAM_BYTES)
            start = first + shard.rank * expert_parallel
            state[start : start + expert_parallel] += size


def own_all(
    dense: list[Stack],
    experts: list[Stack],
    state: np.ndarray,
    *,
    expert_parallel: int,
    experts_stay: bool = False,
) -> MuonPlan:
    """Give every matrix an owner, and add up what the ranks do and send.

    Args:
        dense: With ranks of the world.
        experts: Of one expert-parallel rank, with places.
        state: Bytes of the optimizer, ``[world]``.
        expert_parallel: Expert-parallel size.
        experts_stay: No expert leaves the ranks that hold it.
    """
    # Megatron numbers expert-parallel ranks first, then expert-data-parallel ones, then stages.
    world_size = len(state)
    places = np.arange(world_size) // expert_parallel
    flops, sent = np.zeros(world_size), np.zeros(world_size)
    held, of_dense, besides = own_dense(
        dense, experts, places.tolist(), world_size // expert_parallel
    )
    for expert_rank in range(expert_parallel):
        members = np.arange(expert_rank, world_size, expert_parallel)
        of_experts = relieve(held, besides[members], stay=experts_stay)
        flops[members] = of_experts.loads
        _add_traffic(sent, of_experts, members)
    _add_traffic(sent, of_dense, np.arange(world_size))
    return MuonPlan(flops, state, sent, float(state.sum() / world_size))


def _add_traffic(sent: np.ndarray, assignment: Assignment, ranks: np.ndarray) -> None:
    """Pieces to the owner, of one copy, and results to all copies."""
    for matrix, owner in zip(assignment.matrices, assignment.owners, strict=True):
        for piece in matrix.copy_for(owner, len(ranks)):
            if piece.rank != owner:
                sent[ranks[piece.rank]] += piece.numel * _WIRE_BYTES
        size = sum(piece.numel for piece in matrix.pieces if piece.rank != owner)
        sent[ranks[owner]] += size * _WIRE_BYTES


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of a preset."""
    from trinity_megatron.model.presets import get_preset, trinity_preset

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="large")
    parser.add_argument("--world-size", type=int, default=2048)
    parser.add_argument("--expert-model-parallel-size", type=int, default=8)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    args = parser.parse_args(argv)
    ranks = args.expert_model_parallel_size * args.pipeline_model_parallel_size
    if ranks < 1 or args.world_size < 1 or args.world_size % ranks:
        parser.error(
            f"--world-size {args.world_size} is no multiple of --expert-model-parallel-size x "
            f"--pipeline-model-parallel-size = {ranks}"
        )
    try:
        config: Any = trinity_preset(args.preset)
    except UserError as error:
        parser.error(str(error))
    plan = plan_muon(
        config,
        get_preset(args.preset).model["vocab_size"],
        world_size=args.world_size,
        expert_parallel=args.expert_model_parallel_size,
        stages=even_stages(config.num_layers, args.pipeline_model_parallel_size),
    )
    print(plan)


if __name__ == "__main__":
    main()
