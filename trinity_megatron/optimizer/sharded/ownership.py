"""Which rank orthogonalizes which matrix: pure arithmetic, the same on every rank, no network.

A parameter is a stack of matrices, and its elements lie on the ranks of a group: on tensor-parallel
ranks as parts of rows or columns, and on data-parallel ranks as intervals of the flat part.  Every
matrix has one owner.  Mostly that is the rank that holds it; what is cut, and what a rank has too
much of, is sent to its owner and back (`sharded/exchange.py`).
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

# A rank above this multiple of the mean gives matrices away; a rank with less keeps what it holds.
_TOLERATED_LOAD = 1.03


def newton_schulz_flops(fan_out: int, fan_in: int) -> float:
    """Floating point operations of `orthogonalize` on one matrix, with five steps.

    A step is X X^T, its square, and the product with X, on the short side m and the long side n:
    4 m^2 n + 2 m^3.

    Args:
        fan_out: Rows.
        fan_in: Columns.
    """
    short, long = sorted((fan_out, fan_in))
    return 5 * (4.0 * short**2 * long + 2.0 * short**3)


class Shard(NamedTuple):
    """Elements ``start`` to ``stop`` of a flat parameter, on a rank of its group."""

    rank: int
    start: int
    stop: int


class Piece(NamedTuple):
    """Part of one matrix on one rank.

    Attributes:
        rank: Rank in the group.
        part: Tensor-parallel part of the matrix.
        start: First element, of the part of the matrix taken row by row.
        stop: One past the last.
    """

    rank: int
    part: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Stack:
    """The matrices of one parameter and the ranks that hold them.

    Attributes:
        count: Matrices stacked along the first dimension: experts, or 1.
        rows: Rows of a tensor-parallel part.
        columns: Columns of a tensor-parallel part.
        sizes: Rows of each separate matrix in one group of rows, see `MatrixSplit`.
        shard_dim: What tensor parallelism divides: 0 rows, 1 columns, None nothing.
        holders: For each tensor-parallel part, who holds which elements; where ``shard_dim`` is
            None the parts are copies.
    """

    count: int
    rows: int
    columns: int
    sizes: tuple[int, ...]
    shard_dim: int | None
    holders: tuple[tuple[Shard, ...], ...]

    def renumbered(self, places: Mapping[int, int]) -> "Stack":
        """The same stack with other names of the ranks."""
        return replace(
            self,
            holders=tuple(
                tuple(shard._replace(rank=places[shard.rank]) for shard in shards)
                for shards in self.holders
            ),
        )

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return self.rows // sum(self.sizes)

    @property
    def numel(self) -> int:
        """Elements of a tensor-parallel part."""
        return self.count * self.rows * self.columns

    def shape(self, block: int) -> tuple[int, int]:
        """``(fan_out, fan_in)`` of the whole separate matrix ``block``."""
        whole = [self.groups * self.sizes[block], self.columns]
        if self.shard_dim is not None:
            whole[self.shard_dim] *= len(self.holders)
        return whole[0], whole[1]

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        return (0, *accumulate(self.sizes))

    def elements_before(self, expert: int, block: int, offset: int) -> int:
        """How many elements of a matrix lie before ``offset`` of the flat part."""
        inside = min(max(offset - expert * self.rows * self.columns, 0), self.rows * self.columns)
        size = self.sizes[block] * self.columns
        group, rest = divmod(inside, sum(self.sizes) * self.columns)
        return group * size + min(max(rest - self._offsets[block] * self.columns, 0), size)

    def intervals(self, expert: int, block: int, piece: Piece) -> Iterator[tuple[int, int]]:
        """Yield the intervals of the flat part that a piece consists of."""
        size, stride = self.sizes[block] * self.columns, sum(self.sizes) * self.columns
        first = expert * self.rows * self.columns + self._offsets[block] * self.columns
        position = piece.start
        while position < piece.stop:
            group, inside = divmod(position, size)
            length = min(size - inside, piece.stop - position)
            start = first + group * stride + inside
            yield start, start + length
            position += length

    def copies(self, expert: int, block: int) -> list[list[Piece]]:
        """Pieces of a matrix, for each of its copies; a divided matrix has one copy."""
        size = self.rows * self.columns
        parts = []
        for part, shards in enumerate(self.holders):
            # Thousands of ranks may hold a stack, few of them a part of one matrix.
            begin = bisect_right(self._stops[part], expert * size)
            pieces = []
            for shard in shards[begin:]:
                if shard.start >= (expert + 1) * size:
                    break
                start, stop = (
                    self.elements_before(expert, block, end) for end in (shard.start, shard.stop)
                )
                if start < stop:
                    pieces.append(Piece(shard.rank, part, start, stop))
            parts.append(pieces)
        return parts if self.shard_dim is None else [[piece for part in parts for piece in part]]

    @cached_property
    def _stops(self) -> list[list[int]]:
        return [[shard.stop for shard in shards] for shards in self.holders]


class Matrix(NamedTuple):
    """One matrix.

    Attributes:
        stack: Number of its stack.
        expert: Its place in the stack.
        block: Number of the separate matrix of a fused one.
        cost: Floating point operations of `orthogonalize`.
        copies: Pieces of each of its copies.
    """

    stack: int
    expert: int
    block: int
    cost: float
    copies: tuple[tuple[Piece, ...], ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Pieces of all copies."""
        return tuple(piece for copy in self.copies for piece in copy)

    def copy_for(self, owner: int, ranks: int) -> tuple[Piece, ...]:
        """The copy that is sent to the owner: the one it holds, or that of its replica.

        Args:
            owner: Rank that orthogonalizes the matrix.
            ranks: Size of the group.
        """
        held = [sum(piece.numel for piece in c if piece.rank == owner) for c in self.copies]
        if any(held):
            return self.copies[held.index(max(held))]
        # Replicas of a group lie one after the other.
        return self.copies[owner * len(self.copies) // ranks]

    def whole_on(self) -> list[int]:
        """Ranks that hold all of it."""
        return [copy[0].rank for copy in self.copies if len({p.rank for p in copy}) == 1]


def list_matrices(stacks: Sequence[Stack]) -> list[Matrix]:
    """List every matrix of the stacks, in order."""
    return [
        Matrix(
            number,
            expert,
            block,
            newton_schulz_flops(*stack.shape(block)),
            tuple(map(tuple, stack.copies(expert, block))),
        )
        for number, stack in enumerate(stacks)
        for expert in range(stack.count)
        for block in range(len(stack.sizes))
    ]


@dataclass
class Assignment:
    """Owners of the matrices of one group.

    Attributes:
        matrices: All of the group.
        owners: Rank of the owner of each.
        loads: Cost of each rank, floating point operations a step, other groups included.
    """

    matrices: list[Matrix]
    owners: list[int]
    loads: np.ndarray = field(repr=False)


def hold_matrices(matrices: list[Matrix], ranks: int) -> Assignment:
    """Give every matrix to the rank that holds most of it, of several the one with least to do.

    Args:
        matrices: Matrices of the group.
        ranks: Size of the group.
    """
    loads = np.zeros(ranks)
    owners = []
    for matrix in matrices:
        held: dict[int, int] = {}
        for piece in matrix.pieces:
            held[piece.rank] = held.get(piece.rank, 0) + piece.numel
        owner = min(held, key=lambda rank: (-held[rank], loads[rank], rank))
        owners.append(owner)
        loads[owner] += matrix.cost
    return Assignment(matrices, owners, loads)


def assign_dense(matrices: list[Matrix], base: np.ndarray) -> Assignment:
    """Give the largest matrix first to a rank that holds a part of it or has least to do.

    Args:
        matrices: Matrices of the group.
        base: What each rank has to do already.

    Returns:
        Owners; ``loads`` includes ``base``.
    """
    loads = base.astype(float).copy()
    limit = _TOLERATED_LOAD * (loads.sum() + sum(m.cost for m in matrices)) / max(1, len(loads))
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapify(heap)
    owners = [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda n: -matrices[n].cost):
        matrix = matrices[number]
        near = min({p.rank for p in matrix.pieces}, key=lambda rank: (loads[rank], rank))
        if loads[near] + matrix.cost <= limit:
            owner = near
        else:
            while heap[0][0] != loads[heap[0][1]]:  # an entry from before its rank got more
                heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
            owner = heap[0][1]
        owners[number] = owner
        loads[owner] += matrix.cost
    return Assignment(matrices, owners, loads)


def relieve(assignment: Assignment, base: np.ndarray, *, stay: bool = False) -> Assignment:
    """Move matrices from ranks with too much to do to those with least, while that helps.

    Args:
        assignment: Owners without regard to ``base``.
        base: What each rank has to do besides.
        stay: A matrix moves among the ranks that hold all of it only.

    Returns:
        New owners; ``loads`` includes ``base``.
    """
    loads = assignment.loads + base
    owners = list(assignment.owners)
    limit = _TOLERATED_LOAD * loads.mean()
    held: dict[int, list[int]] = {}
    for number, owner in enumerate(owners):
        held.setdefault(owner, []).append(number)
    for rank in np.argsort(-loads, kind="stable").tolist():
        while loads[rank] > limit and held.get(rank):
            number = held[rank].pop()
            cost = assignment.matrices[number].cost
            holders = assignment.matrices[number].whole_on() if stay else []
            target = min(holders, key=loads.__getitem__) if holders else int(loads.argmin())
            if loads[target] + cost >= loads[rank]:
                break
            owners[number] = target
            loads[rank] -= cost
            loads[target] += cost
    return Assignment(assignment.matrices, owners, loads)


def own_matrices(
    dense: Sequence[Stack],
    experts: Sequence[Stack],
    places: Sequence[int],
    members: Sequence[int],
    *,
    experts_stay: bool = False,
) -> tuple[Assignment, Assignment]:
    """Give every matrix an owner so that all ranks have equally much to do.

    Dense matrices go to any rank, experts to the ranks of their own group: no expert travels to
    another expert-parallel rank.

    Args:
        dense: Dense parameters of all ranks.
        experts: Experts of this rank's group; the other groups hold theirs in the same way.
        places: For each rank, its place in its group of expert ranks.
        members: For each place in this rank's group, the rank.
        experts_stay: No expert leaves the ranks that hold it.

    Returns:
        Owners among all ranks, and owners among the places; ``loads`` of both include the other.
    """
    held, assigned, besides = own_dense(dense, experts, places, len(members))
    return assigned, relieve(held, besides[np.asarray(members, dtype=int)], stay=experts_stay)


def own_dense(
    dense: Sequence[Stack], experts: Sequence[Stack], places: Sequence[int], group_size: int
) -> tuple[Assignment, Assignment, np.ndarray]:
    """Give the dense matrices owners: the same for all groups of expert ranks.

    Args:
        dense: Dense parameters of all ranks.
        experts: Experts of one group; the other groups hold theirs in the same way.
        places: For each rank, its place in its group of expert ranks.
        group_size: Ranks of such a group.

    Returns:
        Experts with their holders, to be relieved; owners of the dense matrices; the cost of the
        dense matrices alone, ``[ranks]``.
    """
    held = hold_matrices(list_matrices(experts), group_size)
    base = held.loads[np.asarray(places, dtype=int)]
    assigned = assign_dense(list_matrices(dense), base)
    return held, assigned, assigned.loads - base
