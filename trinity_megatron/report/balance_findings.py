"""The rules of the balance verdict, applied to every layer of a run at once."""

from dataclasses import dataclass

import numpy as np

from trinity_megatron.report.balance_thresholds import Thresholds, widen_by_noise
from trinity_megatron.report.balance_windows import BiasGrowth, LoadWindows


@dataclass(frozen=True)
class Findings:
    """What each rule finds in each layer; arrays are ``[num_layers]``.

    Attributes:
        collapse_limit: MaxVio of summed counts from which one expert dominates a layer.
        idle: Number of idle experts in the last window.
        is_dominated: One expert dominates the layer, and this does not recede.
        has_many_idle: Collapse by idle experts, which do not become fewer.
        drift_window: The earlier window from which MaxVio has drifted; -1 without a drift.
        bias_drifts: The bias range is large and grows linearly, and MaxVio does not fall.
        is_over_limit: Beyond a limit of balance.
        is_recovering: What is beyond a limit comes down.
        is_building: The run has never been balanced and its bias still builds up.
    """

    collapse_limit: float
    idle: np.ndarray
    is_dominated: np.ndarray
    has_many_idle: np.ndarray
    drift_window: np.ndarray
    bias_drifts: np.ndarray
    is_over_limit: np.ndarray
    is_recovering: np.ndarray
    is_building: np.ndarray

    @classmethod
    def of_run(
        cls, windows: LoadWindows, bias: BiasGrowth, topk: int | None, thresholds: Thresholds
    ) -> "Findings":
        """Apply every rule to every layer.

        Args:
            windows: Load of the run.
            bias: Growth of its bias.
            topk: Experts per token; None if unknown.
            thresholds: Thresholds of the rules.
        """
        limit = thresholds.collapse_limit(windows.num_experts, topk)
        # At first a run is far from balance, until the bias has grown to what the scores need.
        never_balanced = (windows.excess[:-1] > thresholds.average_limit).all(axis=0)
        is_building = never_balanced & bias.builds_up
        is_dominated, has_many_idle = _find_collapse(windows, limit, thresholds)
        is_over_limit, is_recovering = _find_over_limit(windows, thresholds)
        return cls(
            collapse_limit=limit,
            idle=windows.count_idle(-1),
            is_dominated=is_dominated & ~is_building,
            has_many_idle=has_many_idle & ~is_building,
            drift_window=np.where(is_building, -1, _find_drift(windows, thresholds)),
            bias_drifts=bias.drifts & ~windows.is_falling,
            is_over_limit=is_over_limit,
            is_recovering=is_recovering,
            is_building=is_building,
        )


def _find_collapse(
    windows: LoadWindows, limit: float, thresholds: Thresholds
) -> tuple[np.ndarray, np.ndarray]:
    """Layers that one expert dominates, and layers with many idle experts; none that recovers."""
    idle, idle_before = (windows.count_idle(index) for index in (-1, -3))
    is_dominated = (windows.summed_excess >= limit) & ~windows.is_falling
    many = idle >= thresholds.collapse_idle_share * windows.num_experts
    return is_dominated, many & (idle > thresholds.recovery_ratio * idle_before)


def _find_over_limit(windows: LoadWindows, thresholds: Thresholds) -> tuple[np.ndarray, np.ndarray]:
    """Layers beyond a limit of balance, and layers in which what is beyond it comes down."""
    excess, noise = windows.excess[-1], windows.noise[-1]
    average_limits = widen_by_noise(thresholds.average_limit, noise)
    average_is_balanced = excess.mean() <= average_limits.mean()
    layer_limits = widen_by_noise(thresholds.layer_limit, noise)
    is_too_high = excess > (layer_limits if average_is_balanced else average_limits)
    idle, idle_before = (windows.count_idle(index) for index in (-1, -3))
    is_too_idle = idle > thresholds.max_idle_share * windows.num_experts
    fewer_idle = idle <= thresholds.recovery_ratio * idle_before
    load_recovers = windows.is_falling | ~is_too_high
    return is_too_high | is_too_idle, load_recovers & (fewer_idle | ~is_too_idle)


def _find_drift(windows: LoadWindows, thresholds: Thresholds) -> np.ndarray:
    """The window with the lowest MaxVio from which each layer has drifted, or -1."""
    excess, errors = windows.excess, windows.error
    last = excess[-1]
    found = np.full(len(last), -1)
    lowest = np.full(len(last), np.inf)
    min_rise = widen_by_noise(thresholds.drift_rise, windows.noise[-1])
    for index in range(1, len(excess) - 1):
        pair = slice(index - 1, index + 1)  # a single low window may be an accident
        level = excess[pair].max(axis=0)
        rise = last - level
        error = np.hypot(errors[-1], errors[pair].max(axis=0))
        has_risen = (last >= thresholds.drift_ratio * level) & (rise >= min_rise)
        has_risen &= rise >= thresholds.drift_errors * error
        has_risen &= last >= thresholds.drift_peak * excess[index + 1 :].max(axis=0)
        is_lowest = has_risen & (level < lowest)
        found[is_lowest] = index
        lowest[is_lowest] = level[is_lowest]
    return found
