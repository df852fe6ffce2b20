"""The learning rate of a branch: that of its parent at the branch point, annealed to 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from trinity_megatron.upstream.registry import replaced

STYLES = ("linear", "cosine")


@dataclass(frozen=True)
class Annealing:
    """A learning-rate schedule that ends at 0, in samples as Megatron's scheduler counts them.

    Attributes:
        schedule: Keyword arguments of the scheduler of the run that the branch comes from.
        held_at: Where that run's learning rates are read.
        factor: Share of them at ``start``: below 1 for a branch of a branch.
        start: First sample of the branch.
        length: Samples of the branch.
        style: ``linear`` or ``cosine``.
    """

    schedule: Mapping[str, Any]
    held_at: int
    factor: float
    start: int
    length: int
    style: str

    def share(self, samples: int) -> float:
        """Share of the learning rates at ``held_at`` that is left after so many samples."""
        progress = min(1.0, max(0.0, (samples - self.start) / self.length))
        left = 1 - progress if self.style == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.factor * left

    def rate_at(self, samples: int, max_lr: float, min_lr: float) -> float:
        """The learning rate after so many samples.

        Args:
            samples: Of the run.
            max_lr: ``--lr`` of the run that the branch comes from.
            min_lr: Its ``--min-lr``.
        """
        nothing: Any = SimpleNamespace(param_groups=[])
        scheduler = AnnealingScheduler(
            nothing,
            max_lr=max_lr,
            min_lr=min_lr,
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=1,
            wd_incr_style="constant",
            annealing=self,
        )
        scheduler.num_steps = samples
        return scheduler.get_lr({})


class AnnealingScheduler(OptimizerParamScheduler):
    """Megatron's scheduler, held at the branch point and annealed from there.

    Weight decay goes on as the branch's flags say.
    """

    num_steps: int

    def __init__(self, *args: Any, annealing: Annealing, **kwargs: Any) -> None:
        self.annealing = annealing
        super().__init__(*args, **{**kwargs, **annealing.schedule})

    def get_lr(self, param_group: dict) -> float:
        """The learning rate of a group of parameters."""
        samples = self.num_steps
        self.num_steps = min(samples, self.annealing.held_at)
        try:
            held = super().get_lr(param_group)
        finally:
            self.num_steps = samples
        return held * self.annealing.share(samples)


@contextmanager
def annealed(annealing: Annealing) -> Iterator[None]:
    """Let Megatron make its scheduler with an annealing while the block runs."""
    target = "megatron.training.training:OptimizerParamScheduler"
    with replaced(target, lambda _: partial(AnnealingScheduler, annealing=annealing)):
        yield
