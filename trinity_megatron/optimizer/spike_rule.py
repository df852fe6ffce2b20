"""Which step is a spike: its loss or gradient norm lies far above those of the steps before.

OLMo-core's rule, with two differences.  Only what lies above the mean is a spike: a lower loss does
no harm.  What was skipped does not enter the window: a run with a spike goes on as one that never
saw it, and one spike does not hide the next.

Source: ``SkipStepOptimizer`` of https://github.com/allenai/OLMo-core.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any


class SpikeRule:
    """The losses and gradient norms of the last steps, and the limit that follows from them.

    Args:
        sigma: Standard deviations above the mean from which a value is a spike.
        window: Number of steps.  Before half of it is filled only NaN and infinity are spikes.
    """

    def __init__(self, *, sigma: float, window: int) -> None:
        self._sigma, self._window = sigma, window
        self._seen: dict[str, deque[float]] = {
            name: deque(maxlen=window) for name in ("loss", "gradient norm")
        }

    def judge(self, loss: float | None, grad_norm: float) -> str | None:
        """Judge a step, and take what is no spike into the window.

        Args:
            loss: Mean over the tokens of the global batch; None where no token has a loss.
            grad_norm: Before clipping.

        Returns:
            Why the step is a spike; None if it is none.
        """
        values = {"loss": loss, "gradient norm": grad_norm}
        known = {name: value for name, value in values.items() if value is not None}
        reasons = [self._find_reason(name, value) for name, value in known.items()]
        found = [reason for reason in reasons if reason]
        if not found:
            for name, value in known.items():
                self._seen[name].append(value)
        return " and ".join(found) or None

    def _find_reason(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"its {name} is {value}"
        seen = self._seen[name]
        if len(seen) < self._window // 2:
            return None
        mean, deviation = mean_and_deviation(seen)
        if value <= mean + self._sigma * deviation:
            return None
        return (
            f"its {name} {value:.4g} is beyond {self._sigma:g} standard deviations "
            f"({deviation:.3g}) above the mean {mean:.4g} of {len(seen)} steps"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: lists of numbers."""
        return {name: list(values) for name, values in self._seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the window of a checkpoint; of a longer one with its end."""
        for name, values in self._seen.items():
            values.clear()
            values.extend(state.get(name, ()))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample) of at least two numbers."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
