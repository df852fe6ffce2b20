"""Matrices that a rank holds whole and owns, and matrices that have to be exchanged."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trinity_megatron.optimizer.sharded.matrix_placement import MatrixPlacement
from trinity_megatron.optimizer.sharded.ownership import Piece, Stack


class MatrixRun(NamedTuple):
    """Consecutive matrices of a stack that this rank holds whole and owns.

    Attributes:
        stack: Number of the stack in its `MatrixPlacement`.
        block: Number of the matrix in the `MatrixSplit`.
        first: First expert.
        num_experts: Experts.
    """

    stack: int
    block: int
    first: int
    num_experts: int


class CutMatrix(NamedTuple):
    """A matrix that its owner does not hold alone.

    Attributes:
        stack: Number of the stack in its `MatrixPlacement`.
        expert: Expert in the stack.
        block: Number of the matrix in the `MatrixSplit`.
        owner: Rank that orthogonalizes it.
        sources: Pieces that are sent to the owner: one copy of the matrix.
        targets: Pieces of the result that are sent back: all copies of the matrix.
    """

    stack: int
    expert: int
    block: int
    owner: int
    sources: tuple[Piece, ...]
    targets: tuple[Piece, ...]


@dataclass(frozen=True)
class MatrixDivision:
    """The matrices of a placement, by whether they have to be exchanged.

    Attributes:
        runs: Of this rank.
        cuts: Of the whole group, in the same order on every rank.
    """

    runs: list[MatrixRun]
    cuts: list[CutMatrix]


def divide_matrices(placement: MatrixPlacement) -> MatrixDivision:
    """Separate what this rank can do alone from what has to be exchanged.

    Args:
        placement: With owners.
    """
    runs: dict[tuple[int, int], list[MatrixRun]] = {}
    cuts: list[CutMatrix] = []
    group = placement.group
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    for matrix, owner in zip(
        placement.assignment.matrices, placement.assignment.owners, strict=True
    ):
        targets = matrix.pieces
        if any(piece.rank != owner for piece in targets):
            sources = matrix.copy_for(owner, ranks)
            cuts.append(
                CutMatrix(matrix.stack, matrix.expert, matrix.block, owner, sources, targets)
            )
        elif owner == placement.rank:
            _append_to_runs(
                runs.setdefault((matrix.stack, matrix.block), []),
                MatrixRun(matrix.stack, matrix.block, matrix.expert, 1),
            )
    return MatrixDivision([run for found in runs.values() for run in found], cuts)


def _append_to_runs(runs: list[MatrixRun], new: MatrixRun) -> None:
    if runs and runs[-1].first + runs[-1].num_experts == new.first:
        runs[-1] = runs[-1]._replace(num_experts=runs[-1].num_experts + new.num_experts)
    else:
        runs.append(new)


class RunView:
    """Views the matrices of a run; offsets and strides are computed once, for every step.

    Args:
        stack: Their stack.
        start: First element of the flat part in the tensors that are viewed.
        run: Which matrices.

    Attributes:
        run: The same.
        matrix_shape: ``(fan_out, fan_in)`` of each whole matrix.
    """

    def __init__(self, stack: Stack, start: int, run: MatrixRun) -> None:
        self.run = run
        self.matrix_shape = stack.shape(run.block)
        self._num_groups = stack.groups
        self._rows_of_group = sum(stack.sizes)
        self._rows_before = sum(stack.sizes[: run.block])
        self._rows = stack.sizes[run.block]
        expert_stride = stack.rows * stack.columns
        group_stride = self._rows_of_group * stack.columns
        self._view_shape = (run.num_experts, stack.groups, self._rows, stack.columns)
        self._view_strides = (expert_stride, group_stride, stack.columns, 1)
        self._first_element = run.first * expert_stride + self._rows_before * stack.columns - start

    def __call__(self, shard: Tensor) -> Tensor:
        """View them.

        Args:
            shard: The rank's part, flat or whole.

        Returns:
            ``[count, groups, rows, columns]``; a matrix that is a parameter by itself as it is,
            ``[fan_out, fan_in]``: many small ones are common, and three views of each take time.
        """
        if shard.shape == self.matrix_shape:
            return shard
        if shard.is_contiguous():
            # A shard may begin or end inside an expert, beside this matrix: no view of whole
            # experts.
            offset = shard.storage_offset() + self._first_element
            return shard.as_strided(self._view_shape, self._view_strides, offset)
        experts = shard if shard.dim() == 3 else shard.unsqueeze(0)
        experts = experts.narrow(0, self.run.first, self.run.num_experts)
        groups = experts.unflatten(1, (self._num_groups, self._rows_of_group))
        return groups.narrow(2, self._rows_before, self._rows)
