"""Thresholds of the balance verdict, each with its reason, and the rules built on them in words.

The technical report gives no such numbers.  A reason says what was measured or calculated; where
it says "Convention", the number is a choice that no run has been used to calibrate.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the balance verdict.

    Lengths are in logged steps.  MaxVio is compared after subtracting what chance gives.
    """

    min_steps: int = 30
    """Three of the shortest windows: one to judge and two to compare it with."""

    window_share: float = 0.1
    """Convention: a tenth of the run leaves nine earlier windows to compare the last one with."""

    min_window: int = 10
    """With 10 steps the standard error of a mean is known to 24%: ``1 / sqrt(2 * (10 - 1))``."""

    max_window: int = 500
    """Convention: a rise late in a long run is not averaged with more steps than these."""

    average_limit: float = 0.5
    """MaxVio of the average layer in a balanced run.  `docs/balance_study.md`: the four rules that
    move the bias end 0.41 to 0.48 above chance, the run without a bias 3.0 above it."""

    layer_limit: float = 1.0
    """MaxVio of any layer in a run whose average layer is balanced.  Convention: twice
    ``average_limit``, since the highest of many layers lies above their average."""

    drift_ratio: float = 1.5
    """Convention: a drift is a rise by half, so that a constant imbalance is not a drift."""

    drift_rise: float = 0.2
    """Convention: near zero a rise by half is small; 0.2 is two fifths of ``average_limit``."""

    drift_errors: float = 4.0
    """Standard errors, against bursts: where one expert gets four times its share in 12% of the
    steps, 99 of 324 steady layers count as drifting without this rule, 1 with 2 standard errors,
    none with 3 or 4 (``test_bursts_are_not_called_drift`` repeats it in small).  It adds nothing
    against chance alone, which :func:`widen_by_noise` covers."""

    drift_peak: float = 0.9
    """Convention: below this part of the highest MaxVio since the low window, the last window is
    taking the rise back, as after the first steps of a run."""

    collapse_share: float = 0.25
    """Convention: a quarter of the largest possible MaxVio, ``N / K - 1``."""

    collapse_floor: float = 2.0
    """Convention: with few experts a quarter of ``N / K - 1`` is little; MaxVio 2 is three times an
    expert's share, and twice ``layer_limit``."""

    collapse_idle_share: float = 0.1
    """Convention: a layer that loses a tenth of its experts loses a tenth of its capacity."""

    idle_load: float = 0.01
    """Convention: an expert with less than 1% of its share over a window is idle."""

    max_idle_share: float = 0.01
    """Convention: a balanced layer has no idle expert, or one in a hundred."""

    min_idle_tokens: int = 20
    """An expert whose share is 20 tokens in a window gets none with probability ``exp(-20)`` =
    2e-9; with fewer tokens idleness may be chance, and no expert is called idle."""

    recovery_ratio: float = 0.8
    """Convention: MaxVio, or the number of idle experts, recovers if it falls by a fifth within two
    windows."""

    max_bias_range: float = 0.5
    """Half of what two sigmoid scores can differ by.  `docs/balance_study.md`: the rules end at
    0.38 to 0.43."""

    bias_linearity: float = 0.75
    """Growth of the bias range over growth in as long a stretch before: 1 is linear.  Convention:
    three quarters is not yet levelling off."""

    bias_growth: float = 0.2
    """Convention: a bias range that gained a fifth of itself over two fifths of the run grows; one
    that grew linearly from zero gained two fifths."""

    def window_length(self, num_steps: int) -> int:
        """Logged steps of a window: a tenth of the run within bounds."""
        length = int(num_steps * self.window_share)
        return min(self.max_window, max(self.min_window, length))

    def collapse_limit(self, num_experts: int, topk: int | None) -> float:
        """MaxVio of a window's summed counts from which a layer counts as collapsing.

        Args:
            num_experts: Experts of the layer, N.
            topk: Experts per token, K; None if unknown.
        """
        if topk is None:
            return self.collapse_floor
        return max(self.collapse_floor, self.collapse_share * (num_experts / topk - 1))


THRESHOLDS = Thresholds()


def widen_by_noise(limit: float, noise: np.ndarray) -> np.ndarray:
    """The larger of a limit and half of the MaxVio that chance gives.

    With few tokens per expert, MaxVio scatters by more than the limit.

    Args:
        limit: Limit of MaxVio beyond chance.
        noise: MaxVio that chance gives, ``[...]``.

    Returns:
        Limits, ``[...]``.
    """
    return np.maximum(limit, noise / 2)


def describe_rules(
    num_experts: int | None = None,
    topk: int | None = None,
    *,
    thresholds: Thresholds = THRESHOLDS,
) -> tuple[str, ...]:
    """How the verdict is reached: one rule a string, with its thresholds.

    Args:
        num_experts: Experts of a layer; None if unknown.
        topk: Experts per token; None if unknown.
        thresholds: Thresholds to name.
    """
    t = thresholds
    return (
        f"The last window is the last tenth of the logged steps, at least {t.min_window} and at "
        f"most {t.max_window}; earlier windows have the same length. Below {t.min_steps} logged "
        "steps there is no verdict.",
        "Chance alone makes MaxVio positive: it is the expected value for a perfectly balanced "
        "router with as many tokens per expert, and is subtracted before every comparison. Where "
        "half of it is more than a limit or rise named here, that half takes its place.",
        f"Collapsing: over the whole window one expert got so much that MaxVio of the summed "
        f"counts is {_describe_collapse_limit(num_experts, topk, t)}; or at least "
        f"{t.collapse_idle_share:.0%} of a layer's experts are idle, with less than "
        f"{t.idle_load:.0%} of their share; and neither is receding.",
        f"Drifting: a layer's mean MaxVio is at least {t.drift_ratio:g} times that of two earlier "
        f"windows in a row, higher by at least {t.drift_rise:g} and by {t.drift_errors:g} standard "
        f"errors, and within {1 - t.drift_peak:.0%} of its highest value since; or "
        f"the range of its bias exceeds {t.max_bias_range:g} (router scores lie between 0 and 1) "
        f"and still grows linearly: over the last two fifths of the run by at least "
        f"{t.bias_growth:.0%}, and at least {t.bias_linearity:.0%} as much as over the two fifths "
        "before, while MaxVio does not fall.",
        f"Balanced: the average layer's mean MaxVio is at most {t.average_limit:g}, every layer's "
        f"at most {t.layer_limit:g}, and at most {t.max_idle_share:.0%} of a layer's experts are "
        "idle.",
        f"Otherwise settling if in every layer beyond a limit the excess has fallen to "
        f"{t.recovery_ratio:.0%} or less within the last two windows and still falls, else "
        "unbalanced.",
        f"A run that has never been balanced is settling, and neither drifting nor collapsing, as "
        f"long as its bias builds up: a range of at most {t.max_bias_range:g} that grew by at "
        f"least {t.bias_growth:.0%} over the last two fifths of the run.",
        "The state of the run is that of its worst layer.",
    )


def _describe_collapse_limit(
    num_experts: int | None, topk: int | None, thresholds: Thresholds
) -> str:
    text = f"at least {thresholds.collapse_floor:g}"
    if num_experts and topk:
        text += (
            f" and at least {thresholds.collapse_share:g} of the largest possible value N / K - 1 "
            f"= {num_experts} / {topk} - 1 = {num_experts / topk - 1:.3g}"
        )
    return text
