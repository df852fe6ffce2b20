"""The line of a step."""

import math

import pytest

from trinity_megatron.training.callbacks.progress import format_progress


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"max_violation": 0.694, "seconds_left": 3723.4},
            "step  40/400  loss 3.1416  MaxVio 0.69  4,812 tokens/s  1:02:03 left",
        ),
        (  # without TensorBoard, and at the first step
            {"max_violation": None, "seconds_left": None},
            "step  40/400  loss 3.1416  4,812 tokens/s",
        ),
        (
            {"max_violation": None, "seconds_left": None, "num_skipped": 10, "loss": math.nan},
            "step  40/400  loss nan  4,812 tokens/s  10 steps skipped",
        ),
        (
            {"max_violation": None, "seconds_left": None, "train_iters": None},
            "step 40  loss 3.1416  4,812 tokens/s",
        ),
    ],
)
def test_the_line(values: dict, expected: str) -> None:
    given = {"train_iters": 400, "loss": 3.14159, "tokens_per_second": 4811.6, **values}
    assert format_progress(40, given.pop("train_iters"), **given) == expected
