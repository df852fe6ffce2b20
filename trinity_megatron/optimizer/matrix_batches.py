"""Batches of matrices of one shape, which are orthogonalized together."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trinity_megatron.optimizer.update_rule import ParameterStep


class MatrixKind(NamedTuple):
    """What the matrices of one batch have in common.

    Attributes:
        fan_out: Rows.
        fan_in: Columns.
        weight_dtype: Of the parameters.
        device: Of the parameters.
    """

    fan_out: int
    fan_in: int
    weight_dtype: torch.dtype
    device: torch.device


class MatrixPart(NamedTuple):
    """Views of one matrix of a parameter, or of the same matrix of several experts.

    Attributes:
        num_matrices: Matrices in the views.
        weight: Shaped by `RunView`.
        gradient: Shaped like ``weight``.
        momentum: Shaped like ``weight``.
        param: The parameter.
        step: What the step needs of it.
    """

    num_matrices: int
    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    param: Tensor
    step: ParameterStep

    def narrow(self, start: int, count: int) -> "MatrixPart":
        """The part with ``count`` matrices from ``start`` on."""
        return self._replace(
            num_matrices=count,
            weight=self.weight.narrow(0, start, count),
            gradient=self.gradient.narrow(0, start, count),
            momentum=self.momentum.narrow(0, start, count),
        )


def divide_into_batches(parts: list[MatrixPart], batch_size: int) -> Iterator[list[MatrixPart]]:
    """Yield the parts in batches of at most ``batch_size`` matrices, dividing parts where needed.

    Args:
        parts: All of one `MatrixKind`.
        batch_size: At least 1.
    """
    batch: list[MatrixPart] = []
    room = batch_size
    for part in parts:
        start, count = 0, part.num_matrices
        while start < count:
            take = min(room, count - start)
            batch.append(part if take == part.num_matrices else part.narrow(start, take))
            start, room = start + take, room - take
            if room == 0:
                yield batch
                batch, room = [], batch_size
    if batch:
        yield batch
