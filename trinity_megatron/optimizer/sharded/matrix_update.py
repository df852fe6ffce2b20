"""The update of all matrices of one Muon in one step, in two halves.

The first half sends the matrices that have to be exchanged and updates those that this rank holds
whole; the second half waits for the exchange.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trinity_megatron.optimizer.matrix_batches import (
    MatrixKind,
    MatrixPart,
    divide_into_batches,
)
from trinity_megatron.optimizer.sharded.exchange import (
    ExchangeRound,
    PendingTransfer,
    plan_rounds,
)
from trinity_megatron.optimizer.sharded.matrix_placement import MatrixPlacement
from trinity_megatron.optimizer.sharded.matrix_runs import RunView, divide_matrices
from trinity_megatron.optimizer.update_rule import ParameterStep, UpdateRule, UpdatesByStepSize
from trinity_megatron.optimizer.update_statistics import UpdateStatistics


@dataclass(frozen=True)
class UpdatePlan:
    """What a step does with the matrices of a placement; the same in every step.

    Attributes:
        placement: Where the matrices are.
        views: Of the matrices that this rank holds whole and owns.
        rounds: Of the exchange of all others.
    """

    placement: MatrixPlacement
    views: list[RunView]
    rounds: list[ExchangeRound]


def plan_update(placement: MatrixPlacement, rule: UpdateRule) -> UpdatePlan:
    """Plan the steps of a placement; no communication.

    Args:
        placement: With owners.
        rule: Decides on the dtype that is sent.
    """
    division = divide_matrices(placement)
    views = [
        RunView(placement.stacks[run.stack], placement.starts[run.stack], run)
        for run in division.runs
    ]
    dtype = rule.compute_dtype(placement.device, torch.float32)
    return UpdatePlan(placement, views, plan_rounds(placement, division.cuts, dtype))


class MatrixUpdate:
    """One step of the matrices of one Muon.

    Args:
        plans: All of the optimizer.
        rule: The equations.
        steps: The parameters that have a gradient, with what the step needs of them.
        statistics: Filled by the step, if any.
    """

    def __init__(
        self,
        plans: Sequence[UpdatePlan],
        rule: UpdateRule,
        steps: dict[Tensor, ParameterStep],
        statistics: UpdateStatistics | None,
    ) -> None:
        self._plans = plans
        self._rule = rule
        self._steps = steps
        self._statistics = statistics
        self._rounds = [exchange for plan in plans for exchange in plan.rounds]
        self._pending: PendingTransfer | None = None

    def start(self) -> None:
        """Send the matrices of the first round of the exchange; update what this rank holds whole.

        Raises:
            ValueError: A parameter divided over ranks has no gradient.
        """
        if self._rounds:
            self._pending = self._send(self._rounds[0])
        for kind, parts in self._parts_by_kind().items():
            shape = kind.fan_out, kind.fan_in
            for batch in divide_into_batches(parts, self._rule.batch_size(kind.device, shape)):
                self._update_batch(batch, kind)

    def finish(self) -> None:
        """Orthogonalize the matrices that were sent to this rank, and apply all results.

        Raises:
            ValueError: A parameter divided over ranks has no gradient.
        """
        pending, self._pending = self._pending, None
        for number, current in enumerate(self._rounds):
            assert pending is not None
            matrices = current.receive_matrices(pending)
            if number + 1 < len(self._rounds):
                pending = self._send(self._rounds[number + 1])
            self._update_exchanged(current, matrices)

    def _parts_by_kind(self) -> dict[MatrixKind, list[MatrixPart]]:
        parts: dict[MatrixKind, list[MatrixPart]] = defaultdict(list)
        for plan in self._plans:
            for view in plan.views:
                param = plan.placement.tensors[view.run.stack]
                step = None if param is None else self._steps.get(param)
                if param is None or step is None:
                    continue
                kind = MatrixKind(*view.matrix_shape, param.dtype, param.device)
                part = MatrixPart(
                    view.run.num_experts,
                    view(param),
                    view(step.gradient),
                    view(step.momentum),
                    param,
                    step,
                )
                parts[kind].append(part)
        return parts

    def _update_batch(self, batch: list[MatrixPart], kind: MatrixKind) -> None:
        update = self._orthogonalize(self._stack_directions(batch, kind))
        if update.is_cuda:  # where another dtype would be added matrix by matrix
            update = update.to(kind.weight_dtype)
        scale = self._rule.scale(kind.fan_out, kind.fan_in)
        updates = UpdatesByStepSize()
        for rows, part in zip(update.split([p.num_matrices for p in batch]), batch, strict=True):
            found = rows.view(part.weight.shape)
            step_size = part.step.learning_rate * scale
            self._measure(part.param, found, step_size)
            updates.add(step_size, part.weight, found)
        updates.apply()

    def _stack_directions(self, batch: list[MatrixPart], kind: MatrixKind) -> Tensor:
        """What is orthogonalized, ``[count, fan_out, fan_in]`` in the dtype computed in."""
        dtype = self._rule.compute_dtype(
            kind.device, torch.promote_types(batch[0].gradient.dtype, batch[0].momentum.dtype)
        )
        directions = self._rule.directions(
            [part.gradient for part in batch],
            [part.momentum for part in batch],
            [part.step.momentum_factor for part in batch],
        )
        counts = [part.num_matrices for part in batch]
        if len(batch) == 1:
            return directions[0].reshape(counts[0], kind.fan_out, kind.fan_in).to(dtype)
        stacked = torch.empty(
            sum(counts), kind.fan_out, kind.fan_in, dtype=dtype, device=kind.device
        )
        targets = [
            rows.view(direction.shape)
            for rows, direction in zip(stacked.split(counts), directions, strict=True)
        ]
        torch._foreach_copy_(targets, directions)
        return stacked

    def _send(self, exchange: ExchangeRound) -> PendingTransfer:
        def read(number: int) -> Tensor:
            """This rank's part of the direction of a stack, flat."""
            param = exchange.placement.tensors[number]
            if param is None or param not in self._steps:
                stack = exchange.placement.stacks[number]
                raise ValueError(
                    f"a parameter of {stack.count} x {stack.shape(0)} is divided over ranks and "
                    "has no gradient on this one; every rank must have it in every step, of zeros "
                    "if need be"
                )
            return self._rule.direction(self._steps[param]).reshape(-1)

        return exchange.send_to_owners(read)

    def _update_exchanged(self, exchange: ExchangeRound, matrices: list[Tensor]) -> None:
        results = self._orthogonalize_by_shape(matrices, exchange)
        pending = exchange.send_to_holders(results)
        updates = UpdatesByStepSize()
        for interval in exchange.receive_results(pending):
            param = exchange.placement.tensors[interval.stack]
            assert param is not None
            stop = interval.start + len(interval.values)
            weight = param.view(-1)[interval.start : stop]
            step_size = self._steps[param].learning_rate * self._rule.scale(*interval.matrix_shape)
            self._measure(param, interval.values, step_size)
            updates.add(step_size, weight, interval.values)
        updates.apply()

    def _orthogonalize_by_shape(
        self, matrices: list[Tensor], exchange: ExchangeRound
    ) -> list[Tensor]:
        """Orthogonalize matrices of several shapes; the results have the order of the matrices."""
        numbers_by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for number, matrix in enumerate(matrices):
            numbers_by_shape[matrix.shape].append(number)
        results: dict[int, Tensor] = {}
        for shape, numbers in numbers_by_shape.items():
            size = self._rule.batch_size(exchange.placement.device, shape)
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                update = self._orthogonalize(torch.stack([matrices[number] for number in batch]))
                results.update(zip(batch, update, strict=True))
        return [results[number] for number in range(len(matrices))]

    def _orthogonalize(self, stacked: Tensor) -> Tensor:
        update = self._rule.orthogonalize(stacked)
        if self._statistics is not None:
            self._statistics.sample_orthogonality(update)
        return update

    def _measure(self, param: Tensor, update: Tensor, step_size: float) -> None:
        if self._statistics is not None:
            self._statistics.add_update(param, update, step_size)
