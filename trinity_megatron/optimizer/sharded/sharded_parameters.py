"""Which ranks hold which parts of the parameters of a distributed optimizer, and share its work."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from trinity_megatron.optimizer.matrix_split import make_stack
from trinity_megatron.optimizer.muon import Muon
from trinity_megatron.optimizer.sharded.buffer_layout import shard_bounds
from trinity_megatron.optimizer.sharded.distributed_optimizer import (
    ShardedOptimizer,
    gather_objects,
)
from trinity_megatron.optimizer.sharded.matrix_placement import MatrixPlacement
from trinity_megatron.optimizer.sharded.ownership import Assignment, Stack


@dataclass(frozen=True)
class ShardedParameters:
    """Parameters of one distributed optimizer, on all ranks that can share its work.

    All ranks of an optimizer instance can, those of other pipeline stages too: stages differ in
    what they hold, and all of them step at the same time.

    Attributes:
        muon: The optimizer of this rank's shards.
        group: The ranks.
        ranks: Their numbers in the world, in the order of ``group``.
        stacks: Parameters of all stages, with places in ``group`` for ranks.
        tensors: This rank's shard of each, flat; None where it holds nothing.
    """

    muon: Muon
    group: ProcessGroup
    ranks: list[int]
    stacks: list[Stack]
    tensors: list[Tensor | None]

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self.ranks.index(torch.distributed.get_rank())

    @property
    def state_bytes(self) -> int:
        """Masters and momentum of this rank."""
        itemsize = 4 + self.muon.momentum_dtype.itemsize
        return sum(tensor.numel() * itemsize for tensor in self.tensors if tensor is not None)

    def place(self, assignment: Assignment) -> None:
        """Hand the shards and the owners of their matrices to the optimizer."""
        placement = MatrixPlacement(
            stacks=self.stacks,
            tensors=self.tensors,
            assignment=assignment,
            device=torch.device(torch.cuda.current_device()),
            group=self.group,
            rank=self.rank,
        )
        self.muon.place([placement])


@dataclass(frozen=True)
class _Stage:
    """What the ranks of one pipeline stage hold.

    Attributes:
        shard_ranks: Of `ShardedOptimizer.shard_ranks`.
        stacks: Parameters of the stage, with ranks of the world.
    """

    shard_ranks: list[list[int]]
    stacks: list[Stack]


def find_sharded_parameters(
    part: ShardedOptimizer, groups: ProcessGroupCollection, timeout: timedelta
) -> ShardedParameters:
    """Exchange with the other ranks what each of them holds.

    Every rank of the world calls it for the same optimizers in the same order.

    Args:
        part: Around a `Muon`.
        groups: Megatron's groups.
        timeout: Of the group, where it has to be made.

    Raises:
        ValueError: The attributes of a parameter contradict its shape.
    """
    shard_ranks = part.shard_ranks(groups)
    stacks, tensors = [], []
    for param, start, bucket, shard in part.entries():
        holders = shard_bounds(start, param.numel(), bucket, shard_ranks)
        stacks.append(make_stack(param, param.shape, holders, are_replicas=part.has_replicas))
        tensors.append(shard)
    stages: list[_Stage] = gather_objects(_Stage(shard_ranks, stacks), groups.pp)
    ranks = sorted({rank for stage in stages for table in stage.shard_ranks for rank in table})
    places = {rank: place for place, rank in enumerate(ranks)}
    stages_before = stages[: groups.pp.rank()]
    stages_after = stages[groups.pp.rank() + 1 :]
    return ShardedParameters(
        muon=part.optimizer,
        group=_make_group(ranks, part.data_parallel_group, timeout),
        ranks=ranks,
        stacks=[stack.renumbered(places) for stage in stages for stack in stage.stacks],
        tensors=[*_nothing(stages_before), *tensors, *_nothing(stages_after)],
    )


def _nothing(stages: list[_Stage]) -> list[None]:
    """What this rank holds of the parameters of other stages."""
    return [None for stage in stages for _ in stage.stacks]


def _make_group(ranks: list[int], data_parallel: ProcessGroup, timeout: timedelta) -> ProcessGroup:
    """The group of these ranks; every rank of the world calls it, with its own ranks."""
    world = torch.distributed.group.WORLD
    assert world is not None
    # Two numbers of each rank, not its list: that would grow with the square of the world.
    of_all = gather_objects((ranks[0], len(ranks) == data_parallel.size()), world)
    if all(has_group for _, has_group in of_all):
        return data_parallel  # neither tensor nor pipeline parallelism: Megatron has the group
    members: dict[int, list[int]] = {}
    for rank, (first, _) in enumerate(of_all):
        members.setdefault(first, []).append(rank)
    assert members[ranks[0]] == ranks
    groups: dict[int, Any] = {  # of members alone
        first: torch.distributed.new_group(members[first], timeout=timeout)
        for first in sorted(members)
    }
    return groups[ranks[0]]
