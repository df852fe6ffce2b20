"""Measurements of one Muon step, taken when a step is logged."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trinity_megatron.cpu_host.numerics import sum_of_squares


@dataclass
class UpdateStatistics:
    """What one step did, measured on this rank.

    Attributes:
        squares: Sum of squares of the update, float64 ``[]``, by ``gradient_group`` of the
            parameters.
        numel: Elements of the update, by group.
        orthogonality_error: `orthogonality_error` of one result; None where this rank owns no
            matrix.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    numel: dict[str, int] = field(default_factory=dict)
    orthogonality_error: Tensor | None = None
    _marks: list[Any] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of the block as time of the step."""
        self._mark()
        yield
        self._mark()

    def _mark(self) -> None:
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> float:
        """Time of the `timed` blocks; waits for the device."""
        total = 0.0
        for start, stop in zip(self._marks[::2], self._marks[1::2], strict=True):
            if isinstance(start, float):
                total += stop - start
            else:
                stop.synchronize()
                total += start.elapsed_time(stop) / 1e3
        return total

    def add_update(self, param: Tensor, update: Tensor, step_size: float) -> None:
        """Count a part of the update of a parameter.

        Args:
            param: Counted under its ``gradient_group``, or under "all" if it has none.
            update: Orthogonalized, any shape.
            step_size: What it is multiplied with: learning rate and scale.
        """
        group = getattr(param, "gradient_group", None) or "all"
        square = sum_of_squares(update) * step_size**2
        self.squares[group] = self.squares[group] + square if group in self.squares else square
        self.numel[group] = self.numel.get(group, 0) + update.numel()

    def sample_orthogonality(self, orthogonalized: Tensor) -> None:
        """Measure the first matrix of the first batch of the step; ignore the others.

        Args:
            orthogonalized: ``[count, fan_out, fan_in]``.
        """
        if self.orthogonality_error is None:
            self.orthogonality_error = orthogonality_error(orthogonalized[0])


def orthogonality_error(matrix: Tensor) -> Tensor:
    """``|X X^T - I|_F / sqrt(m)`` on the short side m: the RMS distance of the squared singular
    values from 1.

    Args:
        matrix: ``[rows, columns]``, floating.

    Returns:
        float32 ``[]``.
    """
    x = matrix.float()
    x = x.mT if x.shape[0] > x.shape[1] else x
    gram = x @ x.mT
    gram.diagonal().sub_(1.0)
    return torch.linalg.vector_norm(gram) / math.sqrt(len(gram))
