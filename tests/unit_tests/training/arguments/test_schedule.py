"""Steps and samples of a run whose batch grows; warm-up and decay in either."""

from argparse import Namespace
from typing import Any

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.core.num_microbatches_calculator import (  # noqa: E402
    StepBatchsizeNumMicroBatchesCalculator,
)

from trinity_megatron.training.arguments.schedule import (  # noqa: E402
    BatchSizes,
    fit_schedule,
    merge_equal_rates,
)


def make_args(**given: Any) -> Namespace:
    """What Megatron's parser would give."""
    values: dict[str, Any] = {
        "step_batch_size_schedule": None,
        "global_batch_size": None,
        "micro_batch_size": 1,
        "seq_length": 64,
        "world_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "eval_global_batch_size": None,
        "train_iters": None,
        "train_samples": None,
        "lr_decay_style": "WSD",
        "lr_decay_iters": None,
        "lr_decay_samples": None,
        "lr_warmup_fraction": None,
        "lr_warmup_iters": 0,
        "lr_warmup_samples": 0,
        "lr_wsd_decay_fraction": 0.25,
        "lr_wsd_decay_iters": None,
        "lr_wsd_decay_samples": None,
    }
    return Namespace(**{**values, **given})


def consume(schedule: str, steps: int) -> list[int]:
    """Consumed samples after every step, as Megatron's training loop asks for them."""
    megatron = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, schedule, 64)
    consumed = [0]
    for _ in range(steps):
        megatron.update(consumed[-1], consistency_check=False)
        assert megatron.current_global_batch_size is not None
        consumed.append(consumed[-1] + megatron.current_global_batch_size)
    return consumed


@pytest.mark.parametrize(
    "schedule", ["0:4", "0:4 640:8", "0:3,700:5,1K:7", "0:100 64:3 6464:2", "0:5 320:10 640:1"]
)
def test_steps_and_samples_are_those_of_megatron(schedule: str) -> None:
    batches = BatchSizes.of(make_args(step_batch_size_schedule=schedule))
    expected = consume(schedule, 60)
    assert [batches.samples_after(steps) for steps in range(61)] == expected
    for steps, samples in enumerate(expected[1:], 1):
        assert batches.steps_of(samples) == steps
        assert batches.steps_of(samples - 1) == (
            steps if samples - 1 > expected[steps - 1] else steps - 1
        )


def test_the_run_of_large() -> None:
    """The report: 12288 sequences of 8192, 16384 after 4.9T tokens, 17T in all."""
    args = make_args(
        step_batch_size_schedule="0:12288 4.9T:16384",
        seq_length=8192,
        micro_batch_size=1,
        world_size=2048,
        train_samples=round(17e12) // 8192,
        lr_warmup_iters=2000,
        lr_wsd_decay_fraction=3 / 17,
    )
    batches = BatchSizes.of(args)
    assert batches.steps_of(round(4.9e12) // 8192) == 48_678  # "~48.7k steps"
    assert round(batches.steps_of(args.train_samples), -3) == 139_000  # "~139k steps"
    fit_schedule(args)
    assert args.lr_warmup_samples == 2000 * 12288
    assert args.lr_wsd_decay_samples * 8192 == pytest.approx(3e12, rel=1e-6)
    assert args.train_iters is None and args.lr_warmup_iters == 0
    assert args.eval_global_batch_size == 12288


def test_a_length_in_steps_becomes_one_in_samples() -> None:
    args = make_args(
        step_batch_size_schedule="0:4 640:8",
        train_iters=20,
        lr_warmup_iters=4,
        lr_wsd_decay_iters=13,  # of 20: from the seventh step on, before the batch grows
        lr_decay_iters=18,
    )
    fit_schedule(args)
    consumed = consume("0:4 640:8", 20)
    assert args.train_samples == consumed[20]
    assert args.lr_warmup_samples == consumed[4]
    assert args.lr_wsd_decay_samples == consumed[20] - consumed[7]
    assert args.lr_decay_samples == consumed[18]
    assert (args.train_iters, args.lr_decay_iters, args.lr_wsd_decay_iters) == (None, None, None)


def test_a_length_in_samples_takes_the_warmup_of_the_preset() -> None:
    args = make_args(global_batch_size=8, train_samples=400, lr_warmup_iters=10)
    fit_schedule(args)
    assert (args.lr_warmup_samples, args.lr_wsd_decay_samples) == (80, 100)
    args = make_args(
        global_batch_size=8, train_samples=400, lr_warmup_iters=10, lr_warmup_samples=24
    )
    fit_schedule(args)
    assert (args.lr_warmup_samples, args.lr_warmup_iters) == (24, 0)
    args = make_args(global_batch_size=8, train_samples=40, lr_warmup_iters=10)
    fit_schedule(args)
    assert args.lr_warmup_samples == 20  # shortened


def test_a_length_in_steps_stays_one() -> None:
    args = make_args(global_batch_size=8, train_iters=40, lr_warmup_iters=50)
    fit_schedule(args)
    assert (args.train_iters, args.lr_warmup_iters, args.lr_wsd_decay_iters) == (40, 20, 10)
    assert args.train_samples is None


def test_the_micro_batch_divides_every_batch() -> None:
    args = make_args(
        step_batch_size_schedule="0:24 640:36", micro_batch_size=8, world_size=2, train_iters=9
    )
    fit_schedule(args)
    assert args.micro_batch_size == 2  # of 12 and of 18 sequences a rank
    assert args.eval_global_batch_size == 24


def test_what_is_past_binds_nobody() -> None:
    # 8 ranks were 24 after 640 samples.
    schedule = f"0:8 {640 * 64}:24 {6400 * 64}:48"
    args = make_args(step_batch_size_schedule=schedule, world_size=24, micro_batch_size=2)
    with pytest.raises(ValueError, match="24 data-parallel ranks cannot share a batch of 8"):
        fit_schedule(args)
    fit_schedule(args, consumed=640)
    assert (args.micro_batch_size, args.eval_global_batch_size) == (1, 24)
    args = make_args(step_batch_size_schedule=schedule, world_size=24, micro_batch_size=2)
    fit_schedule(args, consumed=6400)
    assert (args.micro_batch_size, args.eval_global_batch_size) == (2, 48)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("0:8 640", "Invalid schedule entry"),
        ("64:8", "threshold 0"),
        ("0:8 1M:8 10:9", "strictly increasing"),
        ("0:0", "positive"),
        ("0:8 640:x", "could not convert"),
        ("0:8 640:4", "becomes smaller"),
        ("0:8 640:9", "2 data-parallel ranks cannot share a batch of 9"),
    ],
)
def test_a_schedule_that_cannot_be(schedule: str, message: str) -> None:
    args = make_args(step_batch_size_schedule=schedule, train_iters=10, world_size=2)
    with pytest.raises(ValueError, match=f"--step-batch-size-schedule '.*{message}.*Remedy: "):
        fit_schedule(args)


@pytest.mark.parametrize(
    ("given", "is_one"),
    [
        ({}, True),
        ({"decoupled_min_lr": 1e-4}, True),
        ({"decoupled_min_lr": 2e-4}, False),
        ({"decoupled_lr": 2e-3}, False),
        ({"optimizer": "muon"}, False),
    ],
)
def test_two_equal_rates_are_one(given: dict[str, Any], is_one: bool) -> None:
    """Megatron ends a resume with two parameter groups of the same rates."""
    values = {"optimizer": "adam", "lr": 1e-3, "min_lr": 1e-4, "decoupled_lr": 1e-3}
    args = Namespace(**{**values, "decoupled_min_lr": None, **given})
    before = dict(vars(args))
    merge_equal_rates(args)
    merged = {**before, "decoupled_lr": None, "decoupled_min_lr": None}
    assert vars(args) == (merged if is_one else before)
