"""What the report needs of a run, as arrays read once from its log."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from trinity_megatron.telemetry.metrics import max_violation
from trinity_megatron.telemetry.tensorboard_log import (
    BIAS_TAG,
    LAYER_NUMBERS_TAG,
    TOKENS_TAG,
    RunLog,
)


@dataclass(frozen=True)
class Series:
    """A scalar over the steps.

    Attributes:
        steps: int64 ``[n]``, ascending.
        values: fp64 ``[n]``; may hold NaN and infinities.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> "Series":
        """The finite values alone."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


class RunHistory:
    """A run's scalars, token counts and biases.

    Args:
        log: The run.

    Attributes:
        steps: Steps with token counts, ``[num_steps]``; empty without.
        tokens_per_expert: Counts, ``[num_steps, num_layers, num_experts]``.
        bias_steps: Steps with biases, ``[any]``.
        expert_bias: ``[any, num_layers, num_experts]``.
    """

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self.steps, self.tokens_per_expert = _stack(log.tensors(TOKENS_TAG))
        self.bias_steps, self.expert_bias = _stack(log.tensors(BIAS_TAG))

    @property
    def has_experts(self) -> bool:
        """Whether there are token counts."""
        return len(self.steps) > 0

    @property
    def num_layers(self) -> int:
        """MoE layers in the log."""
        return self.tokens_per_expert.shape[1]

    @property
    def num_experts(self) -> int:
        """Experts of each MoE layer."""
        return self.tokens_per_expert.shape[2]

    @property
    def topk(self) -> int | None:
        """Experts per token, from Megatron's record of its arguments; None if unknown."""
        value = self.argument("moe_router_topk")
        return int(value) if value and value.isdigit() and int(value) > 0 else None

    @property
    def layer_names(self) -> list[str]:
        """A name for each MoE layer: by its number in the model, or by its order if unknown."""
        written = list(self._log.tensors(LAYER_NUMBERS_TAG).values())
        if written and written[-1].size == self.num_layers:
            return [f"layer {number}" for number in written[-1].reshape(-1)]
        return [f"MoE layer {index + 1}" for index in range(self.num_layers)]

    @cached_property
    def violation(self) -> np.ndarray:
        """MaxVio of each step, ``[num_steps, num_layers]``."""
        return max_violation(torch.from_numpy(self.tokens_per_expert)).numpy()

    def argument(self, name: str) -> str | None:
        """A command line argument, as Megatron writes all of them into the log."""
        written = list(self._log.tensors(f"{name}/text_summary").values())
        if not written or written[-1].size != 1:
            return None
        return _decode(written[-1])

    def texts(self, tag: str) -> dict[int, str]:
        """Texts by step, in the order of the steps; empty if none was ever written."""
        written = self._log.tensors(f"{tag}/text_summary")
        return {step: _decode(text) for step, text in written.items() if text.size == 1}

    def series(self, tag: str) -> Series:
        """A scalar; of length zero if it was never written."""
        values = self._log.scalars(tag)
        return Series(
            np.array(list(values), dtype=np.int64), np.array(list(values.values()), dtype=float)
        )

    def recorded(self, tag: str) -> bool:
        """Whether a scalar or one of the two tensors was ever written."""
        if tag in (TOKENS_TAG, BIAS_TAG):
            return (self.steps if tag == TOKENS_TAG else self.bias_steps).size > 0
        return len(self.series(tag)) > 0

    def tokens_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Training tokens seen until the given steps, linear in between; None if not recorded."""
        seen = self.series("train/tokens_seen").finite
        if len(seen) < 2:
            return None
        return np.interp(steps, seen.steps, seen.values)


def _decode(text: np.ndarray) -> str:
    """A text of the log, an array of one element."""
    value = text.reshape(-1)[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def bin_steps(steps: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the run into equal stretches, each at least as long as the logging interval.

    Args:
        steps: Logged steps in ascending order, ``[n]``.
        most: Stretches at most.

    Returns:
        Edges ``[num_bins + 1]`` and the bin of each step ``[n]``.
    """
    gaps = np.diff(steps)
    gap = float(np.quantile(gaps, 0.95)) if len(gaps) else 1.0
    first, last = float(steps[0]) - gap / 2, float(steps[-1]) + gap / 2
    num_bins = max(1, min(most, round((last - first) / gap)))
    edges = np.linspace(first, last, num_bins + 1)
    return edges, np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, num_bins - 1)


def sum_bins(values: np.ndarray, bins: np.ndarray, num_bins: int) -> np.ndarray:
    """Sum the rows of each bin, ``[n, ...]`` -> ``[num_bins, ...]``; empty bins are zero.

    Args:
        values: ``[n, ...]``.
        bins: Bin of each row in ascending order, ``[n]``.
        num_bins: Number of bins.
    """
    total = np.zeros((num_bins, *values.shape[1:]), dtype=np.float64)
    bounds = np.searchsorted(bins, np.arange(num_bins + 1))
    for index in np.unique(bins):
        total[index] = values[bounds[index] : bounds[index + 1]].sum(axis=0)
    return total


def mean_bins(values: np.ndarray, bins: np.ndarray, num_bins: int) -> np.ndarray:
    """Average the rows of each bin, as :func:`sum_bins`; empty bins are NaN."""
    counts = np.bincount(bins, minlength=num_bins).astype(float)
    counts[counts == 0] = np.nan
    return sum_bins(values, bins, num_bins) / counts.reshape(-1, *[1] * (values.ndim - 1))


def _stack(tensors: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and stacked values; values of another shape than the last one are left out."""
    if not tensors:
        return np.zeros(0, dtype=np.int64), np.zeros((0, 0, 0))
    shape = next(reversed(tensors.values())).shape
    kept = {step: value for step, value in tensors.items() if value.shape == shape}
    return np.array(list(kept)), np.stack(list(kept.values()))
