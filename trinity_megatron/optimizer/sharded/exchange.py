"""Bring cut matrices to their owners and the results back: two all-to-alls for a round.

Everything about a round follows from the `Stack`s and the owners, so every rank of the group plans
it alone, and only elements of matrices travel.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trinity_megatron.optimizer.sharded.ownership import Assignment, Piece, Stack

# Elements that a rank receives on average in one round: 512 MiB in bfloat16.
_ROUND_ELEMENTS = 2**28


@dataclass
class Placement:
    """The parameters of one group of ranks, as one of its ranks sees them.

    Attributes:
        stacks: One for each parameter, the same on every rank of the group.
        tensors: This rank's part of each, flat or whole; None where it holds nothing.
        assignment: Who orthogonalizes what.
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


class Run(NamedTuple):
    """Consecutive matrices of a stack that this rank holds whole and owns."""

    stack: int
    block: int
    first: int
    experts: int


class Cut(NamedTuple):
    """A matrix that is not with its owner alone: sources of its elements, targets of the result."""

    stack: int
    expert: int
    block: int
    owner: int
    sources: tuple[Piece, ...]
    targets: tuple[Piece, ...]


class _Parcel(NamedTuple):
    cut: Cut
    piece: Piece


def plan_runs(placement: Placement) -> tuple[list[Run], list[Cut]]:
    """Tell what this rank can do alone from what has to travel.

    Returns:
        Runs of this rank, and all cut matrices of the group, in the same order on every rank.
    """
    runs: dict[tuple[int, int], list[Run]] = {}
    cuts: list[Cut] = []
    for matrix, owner in zip(
        placement.assignment.matrices, placement.assignment.owners, strict=True
    ):
        stack = placement.stacks[matrix.stack]
        sources = targets = matrix.pieces
        if len(stack.holders) > 1 and stack.shard_dim is None:
            targets = tuple(p for c in stack.copies(matrix.expert, matrix.block) for p in c)
        if any(piece.rank != owner for piece in targets):
            cuts.append(Cut(matrix.stack, matrix.expert, matrix.block, owner, sources, targets))
        elif owner == placement.rank:
            found = runs.setdefault((matrix.stack, matrix.block), [])
            if found and found[-1].first + found[-1].experts == matrix.expert:
                found[-1] = found[-1]._replace(experts=found[-1].experts + 1)
            else:
                found.append(Run(matrix.stack, matrix.block, matrix.expert, 1))
    return [run for found in runs.values() for run in found], cuts


class RunView:
    """Views the matrices of a run; where they lie is computed once, for every step.

    Args:
        stack: Their stack.
        start: First element of the flat part in what is viewed.
        run: Which matrices.

    Attributes:
        run: The same.
        kind: ``(fan_out, fan_in)`` of each whole matrix.
    """

    def __init__(self, stack: Stack, start: int, run: Run) -> None:
        self.run = run
        self.kind = stack.shape(run.block)
        size, self._before = stack.sizes[run.block], sum(stack.sizes[: run.block])
        self._groups = stack.groups, sum(stack.sizes)
        self._shape = run.experts, stack.groups, size, stack.columns
        expert, group = stack.rows * stack.columns, sum(stack.sizes) * stack.columns
        self._strides = expert, group, stack.columns, 1
        self._first = run.first * expert + self._before * stack.columns - start

    def __call__(self, shard: Tensor) -> Tensor:
        """View them.

        Args:
            shard: The rank's part, flat or whole.

        Returns:
            ``[count, groups, size, columns]``; a matrix that is a parameter by itself as it is,
            ``[fan_out, fan_in]``: many small ones are common, and three views of each take time.
        """
        if shard.shape == self.kind:
            return shard
        if shard.is_contiguous():
            # A shard may begin or end inside an expert, beside this matrix: no view of whole
            # experts.
            first = shard.storage_offset() + self._first
            return shard.as_strided(self._shape, self._strides, first)
        whole = shard if shard.dim() == 3 else shard.unsqueeze(0)
        whole = whole.narrow(0, self.run.first, self.run.experts).unflatten(1, self._groups)
        return whole.narrow(2, self._before, self._shape[2])


@dataclass
class Round:
    """Some cut matrices of a group, from their pieces to their owners and back."""

    placement: Placement
    cuts: Sequence[Cut]
    dtype: torch.dtype
    owned: list[Cut] = field(init=False)
    _out: list[list[_Parcel]] = field(init=False, repr=False)
    _in: list[list[_Parcel]] = field(init=False, repr=False)
    _back_out: list[list[_Parcel]] = field(init=False, repr=False)
    _back_in: list[list[_Parcel]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        me = self.placement.rank
        ranks = torch.distributed.get_world_size(self.placement.group)
        self.owned = [cut for cut in self.cuts if cut.owner == me]
        self._out, self._in, self._back_out, self._back_in = (
            list[list[_Parcel]]([] for _ in range(ranks)) for _ in range(4)
        )
        for cut in self.cuts:
            for piece in cut.sources:
                if piece.rank == me:
                    self._out[cut.owner].append(_Parcel(cut, piece))
                if cut.owner == me:
                    self._in[piece.rank].append(_Parcel(cut, piece))
            for piece in cut.targets:
                if piece.rank == me:
                    self._back_in[cut.owner].append(_Parcel(cut, piece))
                if cut.owner == me:
                    self._back_out[piece.rank].append(_Parcel(cut, piece))

    def send(self, read: Callable[[int], Tensor]) -> "Sent":
        """Start to send the pieces to their owners.

        Args:
            read: Returns this rank's flat part of a stack, by number.
        """
        parts: dict[int, Tensor] = {}
        values = []
        for cut, piece in _flat(self._out):
            if cut.stack not in parts:
                parts[cut.stack] = read(cut.stack)
            offset = self.placement.starts[cut.stack]
            for start, stop in self.placement.stacks[cut.stack].intervals(
                cut.expert, cut.block, piece
            ):
                values.append(parts[cut.stack][start - offset : stop - offset])
        return self._all_to_all(values, self._out, self._in)

    def receive(self, sent: "Sent") -> list[Tensor]:
        """Wait for the pieces and return the whole matrices of ``owned``, ``[fan_out, fan_in]``."""
        found: dict[int, list[tuple[Piece, Tensor]]] = {id(cut): [] for cut in self.owned}
        for (cut, piece), value in zip(_flat(self._in), sent.wait(), strict=True):
            found[id(cut)].append((piece, value))
        return [self._assemble(cut, found[id(cut)]) for cut in self.owned]

    def send_back(self, results: Sequence[Tensor]) -> "Sent":
        """Start to send what became of ``owned`` to all who hold a part."""
        parts: dict[tuple[int, int], Tensor] = {}
        for cut, result in zip(self.owned, results, strict=True):
            stack = self.placement.stacks[cut.stack]
            copies = len(stack.holders)
            cut_parts = (
                [result] * copies
                if stack.shard_dim is None
                else result.chunk(copies, stack.shard_dim)
            )
            for part, value in enumerate(cut_parts):
                parts[id(cut), part] = value.reshape(-1)
        values = [
            parts[id(cut), piece.part][piece.start : piece.stop]
            for cut, piece in _flat(self._back_out)
        ]
        return self._all_to_all(values, self._back_out, self._back_in)

    def receive_back(self, sent: "Sent") -> Iterator[tuple[int, int, Tensor, tuple[int, int]]]:
        """Yield stack, offset in this rank's flat part, values, and shape of the whole matrix."""
        for (cut, piece), value in zip(_flat(self._back_in), sent.wait(), strict=True):
            stack, offset = self.placement.stacks[cut.stack], 0
            shape = stack.shape(cut.block)
            first = self.placement.starts[cut.stack]
            for start, stop in stack.intervals(cut.expert, cut.block, piece):
                yield cut.stack, start - first, value[offset : offset + stop - start], shape
                offset += stop - start

    def _assemble(self, cut: Cut, pieces: list[tuple[Piece, Tensor]]) -> Tensor:
        stack = self.placement.stacks[cut.stack]
        pieces.sort(key=lambda found: (found[0].part, found[0].start))
        parts: dict[int, list[Tensor]] = {}
        for piece, value in pieces:
            parts.setdefault(piece.part, []).append(value)
        wholes = [torch.cat(values).view(-1, stack.columns) for values in parts.values()]
        return wholes[0] if stack.shard_dim is None else torch.cat(wholes, stack.shard_dim)

    def _all_to_all(
        self, values: list[Tensor], out: list[list[_Parcel]], into: list[list[_Parcel]]
    ) -> "Sent":
        # An empty tensor first: a rank may have nothing to send.
        empty = torch.empty(0, dtype=self.dtype, device=self.placement.device)
        send = torch.cat([empty, *(value.to(self.dtype) for value in values)])
        sizes = [[sum(p.piece.numel for p in to) for to in lists] for lists in (out, into)]
        received = send.new_empty(sum(sizes[1]))
        work = torch.distributed.all_to_all_single(
            received, send, sizes[1], sizes[0], group=self.placement.group, async_op=True
        )
        return Sent(work, received, [p.piece.numel for p in _flat(into)], send)


class Sent(NamedTuple):
    """An all-to-all on its way."""

    work: torch.distributed.Work | None
    received: Tensor
    sizes: list[int]
    keep: Tensor  # what is sent must live until it has been

    def wait(self) -> tuple[Tensor, ...]:
        """Return the pieces, in the order of the plan."""
        if self.work is not None:
            self.work.wait()
        return self.received.split(self.sizes)


def plan_rounds(placement: Placement, cuts: Sequence[Cut], dtype: torch.dtype) -> list[Round]:
    """Divide the cut matrices of a group into rounds of bounded memory.

    Args:
        placement: The group.
        cuts: What `plan_runs` returned.
        dtype: What travels: the dtype that is computed in.
    """
    if not cuts:
        return []
    limit = _ROUND_ELEMENTS * torch.distributed.get_world_size(placement.group)
    rounds: list[list[Cut]] = [[]]
    size = 0
    for cut in cuts:
        numel = sum(piece.numel for piece in cut.targets)
        if size + numel > limit and rounds[-1]:
            rounds.append([])
            size = 0
        rounds[-1].append(cut)
        size += numel
    return [Round(placement, some, dtype) for some in rounds]


def _flat(lists: Iterable[list[_Parcel]]) -> Iterator[_Parcel]:
    for parcels in lists:
        yield from parcels
