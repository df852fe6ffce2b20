"""Several Muon optimizers that share the ranks: one division of the work, steps side by side."""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from trinity_megatron.optimizer.muon import Muon
from trinity_megatron.optimizer.sharded.distributed_optimizer import (
    ShardedOptimizer,
    gather_objects,
)
from trinity_megatron.optimizer.sharded.ownership import Assignment, own_matrices
from trinity_megatron.optimizer.sharded.sharded_parameters import (
    ShardedParameters,
    find_sharded_parameters,
)
from trinity_megatron.process.screen import tell


class MuonCoordinator:
    """Starts the steps of several Muon optimizers before any of them waits for other ranks.

    The work of the ranks is balanced over the sum of the optimizers, not over each.

    Args:
        optimizers: Of different parameters, in the same order on every rank.
    """

    def __init__(self, optimizers: Sequence[Muon]) -> None:
        self.optimizers = tuple(optimizers)

    def start_steps(self) -> None:
        """Do the first half of all steps; then `Muon.step` of each does its second half.

        Raises:
            ValueError: As `Muon.start_step`.
        """
        for optimizer in self.optimizers:
            optimizer.start_step()


def coordinate(
    parts: Sequence[ShardedOptimizer], groups: ProcessGroupCollection, timeout: timedelta
) -> MuonCoordinator:
    """Give every matrix of some distributed optimizers an owner, and coordinate their steps.

    Every rank of the world has the same optimizers, be they empty.

    Args:
        parts: Around a `Muon`, of dense parameters and of experts; either may be missing.
        groups: Megatron's groups.
        timeout: Of a group that has to be made.

    Returns:
        The coordinator of their optimizers, which know where their matrices are.
    """
    found = {part.is_expert: find_sharded_parameters(part, groups, timeout) for part in parts}
    if found:
        dense, experts = found.get(False), found.get(True)
        stay = any(part.has_replicas for part in parts)
        owners = _assign_owners(dense, experts, experts_stay=stay)
        if dense:
            dense.place(owners.dense)
        if experts:
            experts.place(owners.experts)
        if torch.distributed.get_rank() == 0:
            loads = owners.experts.loads if experts else owners.dense.loads
            _report(owners, loads, sum(each.state_bytes for each in found.values()))
    return MuonCoordinator([part.optimizer for part in parts])


class _Owners(NamedTuple):
    dense: Assignment
    experts: Assignment


def _assign_owners(
    dense: ShardedParameters | None, experts: ShardedParameters | None, *, experts_stay: bool
) -> _Owners:
    """Divide all matrices over the ranks; one of the two may be missing."""
    if dense and experts:
        members = [dense.ranks.index(rank) for rank in experts.ranks]
        places = gather_objects(experts.rank, dense.group)
    else:
        present = dense or experts
        assert present is not None
        places = members = list(range(len(present.ranks)))
    return _Owners(
        *own_matrices(
            dense.stacks if dense else [],
            experts.stacks if experts else [],
            places,
            members,
            experts_stay=experts_stay,
        )
    )


def _report(owners: _Owners, loads: np.ndarray, state_bytes: int) -> None:
    tell(
        f"> Muon: {sum(len(assignment.matrices) for assignment in owners)} matrices owned by "
        f"{len(loads)} ranks, the busiest with {loads.max() / loads.mean():.3f} times the mean "
        f"work; masters and momentum of this rank: {state_bytes / 2**20:,.1f} MiB"
    )
