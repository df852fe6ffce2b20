"""Batches: every matrix once, in order, none too large."""

import pytest
import torch

from trinity_megatron.optimizer.matrix_batches import MatrixPart, divide_into_batches
from trinity_megatron.optimizer.update_rule import ParameterStep

COUNTS = (3, 1, 7, 2)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 13, 100])
def test_batches_are_the_matrices_in_order(batch_size: int) -> None:
    parts, first = [], 0
    for count in COUNTS:
        weight = torch.arange(first, first + count).float().view(count, 1, 1, 1)
        step = ParameterStep(weight + 0.25, weight + 0.5, 0.9, 0.1)
        parts.append(MatrixPart(count, weight, step.gradient, step.momentum, weight, step))
        first += count
    batches = list(divide_into_batches(parts, batch_size))
    sizes = [sum(part.num_matrices for part in batch) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1]) and sizes[-1] <= batch_size
    weights = torch.cat([part.weight for batch in batches for part in batch]).flatten()
    assert torch.equal(weights, torch.arange(sum(COUNTS)).float())
    for batch in batches:
        for part in batch:
            assert len(part.weight) == part.num_matrices
            assert torch.equal(part.gradient, part.weight + 0.25)
            assert torch.equal(part.momentum, part.weight + 0.5)
