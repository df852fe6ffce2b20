"""Bring cut matrices to their owners and the results back: two all-to-alls for a round.

Everything about a round follows from the `Stack`s and the owners, so every rank of the group plans
it alone, and only elements of matrices are sent.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trinity_megatron.optimizer.sharded.matrix_placement import MatrixPlacement
from trinity_megatron.optimizer.sharded.matrix_runs import CutMatrix
from trinity_megatron.optimizer.sharded.ownership import Piece, Stack

# Elements that a rank receives on average in one round: 512 MiB in bfloat16.
_ROUND_ELEMENTS = 2**28


class Parcel(NamedTuple):
    """A piece that is sent.

    Attributes:
        cut: Number of its matrix in the round.
        piece: The piece.
    """

    cut: int
    piece: Piece


class Delivery(NamedTuple):
    """A piece and the ranks between which it is sent."""

    source: int
    target: int
    parcel: Parcel


@dataclass(frozen=True)
class Transfer:
    """What one all-to-all sends and receives on this rank.

    Attributes:
        sent: Parcels in the order of the ranks that get them.
        send_sizes: Elements for each rank.
        received: Parcels in the order of the ranks that send them.
        receive_sizes: Elements from each rank.
    """

    sent: list[Parcel]
    send_sizes: list[int]
    received: list[Parcel]
    receive_sizes: list[int]

    @classmethod
    def plan(cls, deliveries: Iterable[Delivery], rank: int, num_ranks: int) -> "Transfer":
        """Take this rank's part of the deliveries of all ranks.

        Args:
            deliveries: In the same order on every rank.
            rank: This rank in the group.
            num_ranks: Size of the group.
        """
        sent: list[list[Parcel]] = [[] for _ in range(num_ranks)]
        received: list[list[Parcel]] = [[] for _ in range(num_ranks)]
        for delivery in deliveries:
            if delivery.source == rank:
                sent[delivery.target].append(delivery.parcel)
            if delivery.target == rank:
                received[delivery.source].append(delivery.parcel)
        return cls(
            sent=[parcel for parcels in sent for parcel in parcels],
            send_sizes=[_numel(parcels) for parcels in sent],
            received=[parcel for parcels in received for parcel in parcels],
            receive_sizes=[_numel(parcels) for parcels in received],
        )


def _numel(parcels: list[Parcel]) -> int:
    return sum(parcel.piece.numel for parcel in parcels)


class PendingTransfer(NamedTuple):
    """An all-to-all that has been started.

    Attributes:
        work: Handle of the collective.
        transfer: Its plan.
        buffer: What is received.
        send_buffer: Kept alive until it has been sent.
    """

    work: torch.distributed.Work | None
    transfer: Transfer
    buffer: Tensor
    send_buffer: Tensor

    def wait(self) -> Iterator[tuple[Parcel, Tensor]]:
        """Wait, and yield the received parcels with their elements."""
        if self.work is not None:
            self.work.wait()
        received = self.transfer.received
        values = self.buffer.split([parcel.piece.numel for parcel in received])
        return zip(received, values, strict=True)


class UpdatedInterval(NamedTuple):
    """Results for consecutive elements of this rank's part of a stack.

    Attributes:
        stack: Number of the stack.
        start: First element in this rank's flat part.
        values: Orthogonalized, flat.
        matrix_shape: ``(fan_out, fan_in)`` of the whole matrix.
    """

    stack: int
    start: int
    values: Tensor
    matrix_shape: tuple[int, int]


class ExchangeRound:
    """Some cut matrices of a group, from the ranks that hold them to their owners and back.

    Args:
        placement: The group.
        cuts: The matrices.
        dtype: What is sent: the dtype that is computed in.
    """

    def __init__(
        self, placement: MatrixPlacement, cuts: Sequence[CutMatrix], dtype: torch.dtype
    ) -> None:
        self.placement, self.cuts, self.dtype = placement, cuts, dtype
        rank, num_ranks = placement.rank, torch.distributed.get_world_size(placement.group)
        self._owned = [number for number, cut in enumerate(cuts) if cut.owner == rank]
        self._to_owners = Transfer.plan(
            (
                Delivery(piece.rank, cut.owner, Parcel(number, piece))
                for number, cut in enumerate(cuts)
                for piece in cut.sources
            ),
            rank,
            num_ranks,
        )
        self._to_holders = Transfer.plan(
            (
                Delivery(cut.owner, piece.rank, Parcel(number, piece))
                for number, cut in enumerate(cuts)
                for piece in cut.targets
            ),
            rank,
            num_ranks,
        )

    def send_to_owners(self, read: Callable[[int], Tensor]) -> PendingTransfer:
        """Start to send this rank's pieces to their owners.

        Args:
            read: Returns this rank's flat part of a stack, by the number of the stack.
        """
        flat_parts: dict[int, Tensor] = {}
        values = []
        for number, piece in self._to_owners.sent:
            cut = self.cuts[number]
            if cut.stack not in flat_parts:
                flat_parts[cut.stack] = read(cut.stack)
            part, offset = flat_parts[cut.stack], self.placement.starts[cut.stack]
            for start, stop in self._stack(cut).intervals(cut.expert, cut.block, piece):
                values.append(part[start - offset : stop - offset])
        return self._start(self._to_owners, values)

    def receive_matrices(self, pending: PendingTransfer) -> list[Tensor]:
        """Wait for the pieces.

        Args:
            pending: What `send_to_owners` returned.

        Returns:
            The whole matrices that this rank owns, ``[fan_out, fan_in]``.
        """
        pieces: dict[int, list[tuple[Piece, Tensor]]] = {number: [] for number in self._owned}
        for (number, piece), value in pending.wait():
            pieces[number].append((piece, value))
        return [_assemble(self._stack(self.cuts[number]), pieces[number]) for number in self._owned]

    def send_to_holders(self, results: Sequence[Tensor]) -> PendingTransfer:
        """Start to send results to all ranks that hold a part of their matrix.

        Args:
            results: Of the matrices that `receive_matrices` returned, in the same order.
        """
        flat_parts = {
            number: _flat_parts(self._stack(self.cuts[number]), result)
            for number, result in zip(self._owned, results, strict=True)
        }
        values = [
            flat_parts[number][piece.part][piece.start : piece.stop]
            for number, piece in self._to_holders.sent
        ]
        return self._start(self._to_holders, values)

    def receive_results(self, pending: PendingTransfer) -> Iterator[UpdatedInterval]:
        """Wait for the results, and yield them interval by interval.

        Args:
            pending: What `send_to_holders` returned.
        """
        for (number, piece), value in pending.wait():
            cut = self.cuts[number]
            stack, first = self._stack(cut), self.placement.starts[cut.stack]
            matrix_shape = stack.shape(cut.block)
            offset = 0
            for start, stop in stack.intervals(cut.expert, cut.block, piece):
                values = value[offset : offset + stop - start]
                yield UpdatedInterval(cut.stack, start - first, values, matrix_shape)
                offset += stop - start

    def _stack(self, cut: CutMatrix) -> Stack:
        return self.placement.stacks[cut.stack]

    def _start(self, transfer: Transfer, values: list[Tensor]) -> PendingTransfer:
        # An empty tensor first: a rank may have nothing to send.
        empty = torch.empty(0, dtype=self.dtype, device=self.placement.device)
        send_buffer = torch.cat([empty, *(value.to(self.dtype) for value in values)])
        buffer = send_buffer.new_empty(sum(transfer.receive_sizes))
        work = torch.distributed.all_to_all_single(
            buffer,
            send_buffer,
            transfer.receive_sizes,
            transfer.send_sizes,
            group=self.placement.group,
            async_op=True,
        )
        return PendingTransfer(work, transfer, buffer, send_buffer)


def _assemble(stack: Stack, pieces: list[tuple[Piece, Tensor]]) -> Tensor:
    """Put the pieces of a matrix together, ``[fan_out, fan_in]``."""
    pieces.sort(key=lambda found: (found[0].part, found[0].start))
    parts: dict[int, list[Tensor]] = {}
    for piece, value in pieces:
        parts.setdefault(piece.part, []).append(value)
    wholes = [torch.cat(values).view(-1, stack.columns) for values in parts.values()]
    return wholes[0] if stack.shard_dim is None else torch.cat(wholes, stack.shard_dim)


def _flat_parts(stack: Stack, matrix: Tensor) -> list[Tensor]:
    """The tensor-parallel parts or copies of a matrix, each flat."""
    copies = len(stack.holders)
    if stack.shard_dim is None:
        return [matrix.reshape(-1)] * copies
    return [part.reshape(-1) for part in matrix.chunk(copies, stack.shard_dim)]


def plan_rounds(
    placement: MatrixPlacement, cuts: Sequence[CutMatrix], dtype: torch.dtype
) -> list[ExchangeRound]:
    """Divide the cut matrices of a group into rounds of bounded memory.

    Args:
        placement: The group.
        cuts: Of `divide_matrices`.
        dtype: What is sent: the dtype that is computed in.
    """
    if not cuts:
        return []
    limit = _ROUND_ELEMENTS * torch.distributed.get_world_size(placement.group)
    rounds: list[list[CutMatrix]] = [[]]
    size = 0
    for cut in cuts:
        numel = sum(piece.numel for piece in cut.targets)
        if size + numel > limit and rounds[-1]:
            rounds.append([])
            size = 0
        rounds[-1].append(cut)
        size += numel
    return [ExchangeRound(placement, some, dtype) for some in rounds]
