"""Statistics of a run in windows of equal length: MaxVio, chance, idle experts, bias range."""

import math
from functools import lru_cache

import numpy as np
import torch

from trinity_megatron.report.balance_thresholds import Thresholds
from trinity_megatron.telemetry.metrics import load_share, max_violation


@lru_cache(maxsize=4096)
def sampling_noise(mean_tokens: float, num_experts: int) -> float:
    """Expected MaxVio when every expert draws its tokens by chance with equal probability.

    The counts are taken as independent Poisson variables, which is a little more than what a
    token's distinct experts give: ``E[max] = sum_k (1 - P(count <= k) ** num_experts)``.

    Args:
        mean_tokens: Tokens per expert.
        num_experts: Experts of the layer.
    """
    # Of many tokens the noise is below 1e-4 (and the table of their counts would be large).
    if not 0 < mean_tokens < 1e10:
        return 0.0
    low = max(0, math.floor(mean_tokens - 12 * math.sqrt(mean_tokens)))
    high = math.ceil(mean_tokens + 14 * math.sqrt(mean_tokens) + 40)
    counts = np.arange(low, high + 1, dtype=np.float64)
    first = low * math.log(mean_tokens) - mean_tokens - math.lgamma(low + 1)
    log_pmf = first + np.concatenate([[0.0], np.cumsum(np.log(mean_tokens / counts[1:]))])
    cdf = np.cumsum(np.exp(log_pmf))
    cdf /= cdf[-1]  # rounding of large numbers
    largest = low + float(np.sum(1.0 - cdf**num_experts))
    return max(0.0, largest / mean_tokens - 1.0)


def sampling_noises(mean_tokens: np.ndarray, num_experts: int) -> np.ndarray:
    """:func:`sampling_noise` of each of the values, ``[...]``."""
    # Three digits are enough, and make the values of all layers and of many steps one.
    flat = [sampling_noise(float(f"{value:.3g}"), num_experts) for value in mean_tokens.flat]
    return np.array(flat).reshape(mean_tokens.shape)


class LoadWindows:
    """Means over windows, the last window last; steps before the first full window are left out.

    Args:
        tokens_per_expert: Counts, ``[num_steps, num_layers, num_experts]``.
        thresholds: Give the length of a window, what is idle and what is falling.

    Attributes:
        window: Logged steps of a window.
        num_experts: Experts of each layer.
        violation: Mean MaxVio, ``[num_windows, num_layers]``.
        error: Its standard error, ``[num_windows, num_layers]``.
        noise: MaxVio that chance gives, ``[num_windows, num_layers]``.
        loads: Counts of the window relative to their mean,
            ``[num_windows, num_layers, num_experts]``.
        tokens: Tokens per expert in the window, ``[num_windows, num_layers]``.
    """

    def __init__(self, tokens_per_expert: np.ndarray, thresholds: Thresholds) -> None:
        window = thresholds.window_length(len(tokens_per_expert))
        num_windows = len(tokens_per_expert) // window
        counts = tokens_per_expert[-num_windows * window :]
        shape = (num_windows, window, *counts.shape[1:])
        violation = max_violation(torch.from_numpy(counts)).numpy().reshape(shape[:3])
        sums = counts.reshape(shape).sum(axis=1)
        self._thresholds = thresholds
        self.window = window
        self.num_experts = counts.shape[2]
        self.violation = violation.mean(axis=1)
        self.error = violation.std(axis=1, ddof=1) / math.sqrt(window)
        self.tokens = sums.mean(axis=2)
        self.noise = sampling_noises(self.tokens / window, self.num_experts)
        self.loads = load_share(torch.from_numpy(sums)).numpy()

    @property
    def excess(self) -> np.ndarray:
        """Mean MaxVio beyond chance, ``[num_windows, num_layers]``."""
        return np.maximum(self.violation - self.noise, 0.0)

    @property
    def summed_excess(self) -> np.ndarray:
        """MaxVio of the last window's summed counts beyond chance, ``[num_layers]``."""
        noise = sampling_noises(self.tokens[-1], self.num_experts)
        return np.maximum(self.loads[-1].max(axis=-1) - 1.0 - noise, 0.0)

    @property
    def is_falling(self) -> np.ndarray:
        """Whether the excess falls over the last three windows, ``[num_layers]``."""
        two_before, one_before, now = self.excess[-3:]
        has_recovered = now <= self._thresholds.recovery_ratio * two_before
        return has_recovered & (now < one_before)

    def count_idle(self, index: int) -> np.ndarray:
        """Number of idle experts in a window, ``[num_layers]``."""
        has_enough_tokens = self.tokens[index] >= self._thresholds.min_idle_tokens
        num_idle = (self.loads[index] < self._thresholds.idle_load).sum(axis=-1)
        return np.where(has_enough_tokens, num_idle, 0)


class BiasGrowth:
    """Range (largest minus smallest bias) of each layer and how it grows.

    Args:
        expert_bias: Bias, ``[any, num_layers, num_experts]``; None if it was not recorded.
        num_layers: MoE layers of the run.
        thresholds: Say what is large and what grows.

    Attributes:
        range: Mean over the last window, ``[num_layers]``; NaN without a record.
        builds_up: The range is small and has grown over the last two fifths of the run.
        drifts: The range is large and grows without slowing down.
    """

    def __init__(
        self, expert_bias: np.ndarray | None, num_layers: int, thresholds: Thresholds
    ) -> None:
        self.range = np.full(num_layers, np.nan)
        self.builds_up = np.zeros(num_layers, dtype=bool)
        self.drifts = np.zeros(num_layers, dtype=bool)
        if expert_bias is None or len(expert_bias) < thresholds.min_steps:
            return
        ranges = expert_bias.max(axis=-1) - expert_bias.min(axis=-1)  # [steps, layers]
        window = thresholds.window_length(len(ranges))
        two_fifths = 2 * len(ranges) // 5
        now = _mean_of_window(ranges, window, 0)
        middle = _mean_of_window(ranges, window, two_fifths)
        start = _mean_of_window(ranges, window, min(2 * two_fifths, len(ranges) - window))
        grows = now - middle >= thresholds.bias_growth * now
        is_linear = now - middle >= thresholds.bias_linearity * (middle - start)
        is_large = now > thresholds.max_bias_range
        self.range = now
        self.builds_up = grows & (now > 0) & (now <= thresholds.max_bias_range)
        self.drifts = grows & is_linear & is_large


def _mean_of_window(values: np.ndarray, window: int, steps_after: int) -> np.ndarray:
    """Mean of the window that ends ``steps_after`` steps before the end, ``[num_layers]``."""
    end = len(values) - steps_after
    return values[end - window : end].mean(axis=0)
