"""Batch size and learning-rate schedule of a run: what a preset's steps become in this run."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import flag_of
from trinity_megatron.process.screen import tell_once

_MAX_SAMPLES = 2**33  # 17T tokens in sequences of 8,192 are a quarter of it


@dataclass(frozen=True)
class BatchSizes:
    """The global batch of every step.

    Attributes:
        entries: ``(samples, batch)``: from so many consumed samples on, so many in a batch;
            ascending, the first from 0 on.
    """

    entries: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, args: argparse.Namespace) -> BatchSizes:
        """Those of ``--step-batch-size-schedule``, or ``--global-batch-size`` for ever.

        Raises:
            UserError: The schedule cannot be read.
        """
        schedule = args.step_batch_size_schedule
        if schedule is None:  # without either Megatron takes one micro-batch for each rank
            return cls(((0, args.global_batch_size or args.micro_batch_size * _replicas(args)),))
        try:
            made = StepBatchsizeNumMicroBatchesCalculator(
                1, 1, False, rank=-1, schedule=schedule, seq_length=args.seq_length
            )
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"--step-batch-size-schedule {schedule!r}: {error}. Remedy: consumed tokens and "
                "batch sizes, the first from 0 tokens on, e.g. '0:12288 4.9T:16384'."
            ) from error
        return cls(tuple(made.schedule))

    def samples_after(self, steps: int) -> int:
        """Consumed samples after the first ``steps`` steps."""
        consumed = 0
        for (_, batch), end in zip(self.entries, self._ends(), strict=True):
            # A step that begins before the end is of the old size.
            count = steps if end is None else min(steps, -(-(end - consumed) // batch))
            consumed, steps = consumed + max(0, count) * batch, steps - max(0, count)
        return consumed

    def steps_of(self, samples: int) -> int:
        """Steps that it takes to consume at least ``samples``."""
        consumed = steps = 0
        for (_, batch), end in zip(self.entries, self._ends(), strict=True):
            until = samples if end is None else min(samples, end)
            count = max(0, -(-(until - consumed) // batch))
            consumed, steps = consumed + count * batch, steps + count
        return steps

    def sizes_from(self, samples: int) -> list[int]:
        """The batch sizes that are still to come when so many samples are consumed."""
        return [
            batch
            for (_, batch), end in zip(self.entries, self._ends(), strict=True)
            if end is None or end > samples
        ]

    def _ends(self) -> list[int | None]:
        return [start for start, _ in self.entries[1:]] + [None]


def merge_equal_rates(args: argparse.Namespace) -> None:
    """Take two equal learning rates of AdamW as one.

    Megatron tells parameter groups apart by their rates when it loads them: two groups with the
    same rates would end a resume.
    """
    same_end = args.decoupled_min_lr in (None, args.min_lr)
    if args.optimizer != "muon" and args.decoupled_lr == args.lr and same_end:
        args.decoupled_lr = args.decoupled_min_lr = None


def fit_schedule(args: argparse.Namespace, consumed: int = 0) -> None:
    """Fit the preset's batch, warm-up and decay to the length and the ranks of this run.

    Where the batch grows, or the length is given in samples, all lengths are turned into samples,
    which Megatron's scheduler counts; it would multiply steps with one batch size.

    Args:
        args: Of the run; changed.
        consumed: Samples consumed before a resume.

    Raises:
        UserError: The batch sizes cannot be read or divided over the ranks, or become smaller.
    """
    _check_decay(args)
    batches = BatchSizes.of(args)
    _check_length(args, batches)
    _fit_micro_batch(args, batches.sizes_from(consumed))
    if args.lr_warmup_fraction is not None:
        args.lr_warmup_iters = 0
    if args.step_batch_size_schedule is not None or args.train_samples:
        _count_in_samples(args, batches)
    elif args.train_iters:
        args.lr_warmup_iters = _shortened(args.lr_warmup_iters, args.train_iters, "steps")
        if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
            args.lr_wsd_decay_iters = max(1, round(args.lr_wsd_decay_fraction * args.train_iters))


def _check_decay(args: argparse.Namespace) -> None:
    """The final decay lies within the run."""
    for decay, length in (
        ("lr_wsd_decay_iters", "train_iters"),
        ("lr_wsd_decay_samples", "train_samples"),
    ):
        steps, total = getattr(args, decay), getattr(args, length)
        if steps and total and steps > total:
            raise UserError(
                f"{flag_of(decay)} {steps} is above {flag_of(length)} {total}: the decay would "
                f"begin before the run. Remedy: at most {total}."
            )


def _check_length(args: argparse.Namespace, batches: BatchSizes) -> None:
    """The order of all samples of a run is an array in memory, which cannot have any length."""
    samples = args.train_samples or batches.samples_after(args.train_iters or 0)
    if samples > _MAX_SAMPLES:
        flag = "train_samples" if args.train_samples else "train_iters"
        raise UserError(
            f"{flag_of(flag)} {getattr(args, flag)} makes a run of {samples:.3g} sequences, and "
            f"their order is kept in memory. Remedy: at most {_MAX_SAMPLES} sequences."
        )


def _count_in_samples(args: argparse.Namespace, batches: BatchSizes) -> None:
    if args.train_samples is None and args.train_iters:
        args.train_samples = batches.samples_after(args.train_iters)
    if not args.train_samples:
        return  # Megatron says that it is missing
    total, steps = args.train_samples, batches.steps_of(args.train_samples)
    if args.lr_decay_iters and not args.lr_decay_samples:
        args.lr_decay_samples = batches.samples_after(args.lr_decay_iters)
    if args.lr_warmup_iters and not args.lr_warmup_samples:
        args.lr_warmup_samples = batches.samples_after(args.lr_warmup_iters)
    args.lr_warmup_samples = _shortened(args.lr_warmup_samples, total, "samples")
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_samples is None:
        if args.lr_wsd_decay_iters:
            before = batches.samples_after(max(0, steps - args.lr_wsd_decay_iters))
            args.lr_wsd_decay_samples = total - before
        else:
            args.lr_wsd_decay_samples = max(1, round(args.lr_wsd_decay_fraction * total))
    args.train_iters = args.lr_decay_iters = args.lr_wsd_decay_iters = None
    args.lr_warmup_iters = 0


def _shortened(warmup: int, total: int, unit: str) -> int:
    if warmup < total:
        return warmup
    tell_once(f"> warm-up shortened from {warmup} to {total // 2} of {total} {unit}")
    return total // 2


def _fit_micro_batch(args: argparse.Namespace, sizes: list[int]) -> None:
    """Cut the micro-batch where a rank's share of a global batch is no multiple of it."""
    replicas = _replicas(args)
    uneven = [size for size in sizes if size % replicas]
    if args.step_batch_size_schedule is not None:  # Megatron would look when the run comes to it
        if uneven:
            raise UserError(
                f"--step-batch-size-schedule {args.step_batch_size_schedule!r}: {replicas} "
                f"data-parallel ranks cannot share a batch of {uneven[0]}. Remedy: multiples of "
                f"{replicas}."
            )
        if sizes != sorted(sizes):
            raise UserError(
                f"--step-batch-size-schedule {args.step_batch_size_schedule!r}: a batch that "
                "becomes smaller ends a run of Megatron. Remedy: sizes that grow."
            )
    if uneven:
        return  # Megatron says what is wrong
    size = math.gcd(args.micro_batch_size, *(size // replicas for size in sizes))
    if size != args.micro_batch_size:
        tell_once(f"> micro-batch cut from {args.micro_batch_size} to {size} sequences")
        args.micro_batch_size = size
    if args.step_batch_size_schedule is not None and args.eval_global_batch_size is None:
        args.eval_global_batch_size = sizes[0]  # Megatron's is one micro-batch for each rank


def _replicas(args: argparse.Namespace) -> int:
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    return args.world_size // (ranks * args.context_parallel_size)
