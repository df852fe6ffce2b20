"""Statistics of a step: sums and maxima by name and layer."""

import math

import torch

from trinity_megatron.telemetry.step_statistics import STATISTIC_NAMES, StepStatistics


def test_micro_batches_add_up() -> None:
    statistics, cpu = StepStatistics(), torch.device("cpu")
    values = [torch.randn(7, dtype=torch.float64) for _ in range(3)]
    for value in values:
        statistics.observe(
            "router/logit", layer=2, count=len(value), total=value.sum(), maximum=value.max()
        )
    table = statistics.take(3, cpu)
    assert table.shape == (len(STATISTIC_NAMES), 4, 3) and table.dtype == torch.float64
    together = torch.cat(values)
    row = table[STATISTIC_NAMES.index("router/logit"), 2]
    torch.testing.assert_close(row[1], together.sum())
    assert row[0] == 21 and row[2] == together.max()
    # Everything else: nothing seen, of which the maximum is below every number.
    empty = (table[..., 0] == 0) & (table[..., 1] == 0) & (table[..., 2] == -math.inf)
    assert empty.sum() == empty.numel() - 1
    # Taken is forgotten.
    assert (statistics.take(3, cpu)[..., 0] == 0).all()


def test_losses_of_micro_batches() -> None:
    statistics, cpu = StepStatistics(), torch.device("cpu")
    assert statistics.take_micro_batches(2, cpu).tolist() == [[0, 0], [0, 0]]
    # A step that is run again: the first three are of the run that was thrown away.
    for loss in (9.0, 9.0, 9.0, 1.5, 2.5, 3.5):
        statistics.observe_micro_batch(torch.tensor(loss), torch.tensor(4))
    assert statistics.take_micro_batches(3, cpu).tolist() == [[1.5, 4], [2.5, 4], [3.5, 4]]
    assert not statistics.take_micro_batches(3, cpu).any()
