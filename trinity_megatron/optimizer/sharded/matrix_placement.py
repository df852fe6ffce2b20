"""Where the matrices of Muon's parameters are: on which ranks, and which rank owns which."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trinity_megatron.optimizer.matrix_split import make_stack
from trinity_megatron.optimizer.sharded.ownership import (
    Assignment,
    Shard,
    Stack,
    assign_dense,
    list_matrices,
)


@dataclass
class MatrixPlacement:
    """The parameters of one group of ranks, as one of its ranks sees them.

    Attributes:
        stacks: One for each parameter, the same on every rank of the group.
        tensors: This rank's part of each, flat or whole; None where it holds nothing.
        assignment: Which rank orthogonalizes which matrix.
        group: The ranks; None stands for this rank alone.
        device: Where the parameters are.
        rank: This rank in the group.
    """

    stacks: list[Stack]
    tensors: list[Tensor | None]
    assignment: Assignment
    device: torch.device
    group: ProcessGroup | None = None
    rank: int = 0

    @cached_property
    def starts(self) -> list[int]:
        """First element of this rank's part of each stack, in the flat tensor-parallel part."""
        return [
            next((s.start for shards in stack.holders for s in shards if s.rank == self.rank), 0)
            for stack in self.stacks
        ]


def place_whole_parameters(
    params: Sequence[Tensor],
    tp_group: ProcessGroup | None,
    expert_tp_group: ProcessGroup | None,
) -> list[MatrixPlacement]:
    """Place parameters of which every data-parallel rank holds its tensor-parallel part whole.

    Args:
        params: Each ``[out, in]`` or ``[E, out, in]``.
        tp_group: Tensor-parallel group; None stands for one rank.
        expert_tp_group: The same for routed experts.

    Returns:
        One placement for each group that holds parameters, those without a group among them.

    Raises:
        ValueError: The attributes of a parameter contradict its shape.
    """
    by_group: dict[ProcessGroup | None, list[Tensor]] = defaultdict(list)
    for param in params:
        is_expert = getattr(param, "expert_tp", False) or not getattr(param, "allreduce", True)
        group = expert_tp_group if is_expert else tp_group
        is_alone = group is None or torch.distributed.get_world_size(group) == 1
        by_group[None if is_alone else group].append(param)
    return [_place_on_group(members, group) for group, members in by_group.items()]


def _place_on_group(params: list[Tensor], group: ProcessGroup | None) -> MatrixPlacement:
    num_ranks = 1 if group is None else torch.distributed.get_world_size(group)
    stacks = [
        make_stack(
            param, param.shape, [(Shard(rank, 0, param.numel()),) for rank in range(num_ranks)]
        )
        for param in params
    ]
    return MatrixPlacement(
        stacks=stacks,
        tensors=list(params),
        assignment=assign_dense(list_matrices(stacks), np.zeros(num_ranks)),
        device=params[0].device,
        group=group,
        rank=0 if group is None else torch.distributed.get_rank(group),
    )
