"""Does the load of the experts stay balanced?  A judgement of token counts, in plain words."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from trinity_megatron.telemetry.metrics import load_share, max_violation

State = Literal["balanced", "settling", "unbalanced", "drifting", "collapsing", "too short"]

# All lengths are in logged steps.  The constants are ours: the report gives none.
MIN_STEPS = 30  # three of the shortest windows: one to judge, two to compare it with
WINDOW_SHARE, MIN_WINDOW, MAX_WINDOW = 0.1, 10, 500
MEAN_LIMIT, LAYER_LIMIT = 0.5, 1.0  # MaxVio beyond chance: of the average layer, of any layer
DRIFT_RATIO, DRIFT_RISE = 1.5, 0.2
DRIFT_ERRORS = 4.0  # standard errors: some 500 pairs of windows are compared in a large model
COLLAPSE_SHARE, COLLAPSE_FLOOR = 0.25, 2.0  # of the largest possible MaxVio; at least
IDLE_LOAD = 0.01  # an expert with less than this part of its share is idle
IDLE_COLLAPSE, IDLE_LIMIT = 0.1, 0.01  # share of idle experts in a layer: of collapse, of balance
IDLE_MIN_TOKENS = 20  # tokens of a share in a window, below which idleness may be chance
RECOVERY = 0.8  # falls to this part within two windows
BIAS_RANGE = 0.5  # half of what a sigmoid score can differ by
BIAS_LINEAR, BIAS_GROWTH = 0.75, 0.2

WHAT_HELPED = (
    "What Trinity Large changed when this happened to it (technical report, section 6): SMEBU, "
    "the sequence-wise balance loss at 1e-4, more leading dense layers, z-loss, masking between "
    "documents, BF16 instead of MXFP8."
)

# From the worst state to the mildest.
_STATE_WORDS: tuple[tuple[State, str], ...] = (
    ("collapsing", "collapsing"),
    ("drifting", "losing balance"),
    ("unbalanced", "not balanced, and improves slowly if at all"),
    ("settling", "not balanced yet (MaxVio falls, or the bias still builds up)"),
)


@dataclass(frozen=True)
class LayerVerdict:
    """One layer over the last window.

    Attributes:
        name: How the layer is called on the page.
        state: Its state.
        violation: Mean MaxVio of the window's steps.
        noise: MaxVio that chance alone gives a perfectly balanced router with as many tokens.
        best: Lowest mean MaxVio of an earlier window.
        busiest: The expert with most tokens in the window.
        busiest_load: Its tokens relative to the mean.
        idle: Number of idle experts.
        bias_range: Largest minus smallest bias, mean of the window; NaN without a record.
        reason: A clause that says why it is not balanced; empty if it is.
    """

    name: str
    state: State
    violation: float
    noise: float
    best: float
    busiest: int
    busiest_load: float
    idle: int
    bias_range: float
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """The judgement of a run.

    Attributes:
        state: The run's state.
        text: Why, in a few sentences.
        layers: The layers, in their order; empty if the run is too short.
        worst: The layers that decided, worst first; empty if balanced.
        first_step: First step of the last window.
        last_step: Last step of the last window.
        num_steps: Logged steps in the window.
    """

    state: State
    text: str
    layers: tuple[LayerVerdict, ...] = ()
    worst: tuple[LayerVerdict, ...] = ()
    first_step: int = 0
    last_step: int = 0
    num_steps: int = 0

    @property
    def headline(self) -> str:
        """State and reason in one line."""
        return f"{self.state.capitalize()}. {self.text}"


def judge_balance(
    steps: np.ndarray,
    tokens_per_expert: np.ndarray,
    *,
    expert_bias: np.ndarray | None = None,
    topk: int | None = None,
    layer_names: list[str] | None = None,
) -> Verdict:
    """Judge a run by its last window against its earlier ones.

    Args:
        steps: Logged steps in ascending order, ``[num_steps]``.
        tokens_per_expert: Counts, ``[num_steps, num_layers, num_experts]``.
        expert_bias: Bias at the same or at other steps, ``[any, num_layers, num_experts]``.
        topk: Experts per token; None if unknown.
        layer_names: ``[num_layers]``; ``MoE layer k`` if None.

    Returns:
        The verdict; :func:`rules` says in words how it is reached.
    """
    num_steps, num_layers, _ = tokens_per_expert.shape
    if num_steps < MIN_STEPS:
        return Verdict(
            "too short",
            f"The run has {num_steps} logged steps; a verdict needs at least {MIN_STEPS}.",
        )
    names = layer_names or [f"MoE layer {index + 1}" for index in range(num_layers)]
    window = window_length(num_steps)
    blocks = _Blocks(tokens_per_expert, window)
    layers = _judge_layers(names, steps, blocks, expert_bias, topk)
    state, worst, text = _judge_run(layers, blocks, len(names))
    first, last = int(steps[-window]), int(steps[-1])
    return Verdict(state, text, layers, worst, first, last, window)


def window_length(num_steps: int) -> int:
    """Logged steps of a window: a tenth of the run within bounds."""
    return min(MAX_WINDOW, max(MIN_WINDOW, int(num_steps * WINDOW_SHARE)))


def collapse_limit(num_experts: int, topk: int | None) -> float:
    """MaxVio of a whole window beyond which a layer counts as collapsing."""
    if topk is None:
        return COLLAPSE_FLOOR
    return max(COLLAPSE_FLOOR, COLLAPSE_SHARE * (num_experts / topk - 1))


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


def tolerance(limit: float, noise: np.ndarray) -> np.ndarray:
    """A limit of MaxVio beyond chance; where chance gives more than twice as much, half of that."""
    return np.maximum(limit, noise / 2)


def rules(num_experts: int | None = None, topk: int | None = None) -> tuple[str, ...]:
    """How the verdict is reached, one rule a sentence, with every threshold."""
    limit = f"at least {COLLAPSE_FLOOR:g}"
    if num_experts and topk:
        limit += (
            f" and at least {COLLAPSE_SHARE:g} of the largest possible value N / K - 1 = "
            f"{num_experts} / {topk} - 1 = {num_experts / topk - 1:.3g}"
        )
    return (
        f"The last window is the last tenth of the logged steps, at least {MIN_WINDOW} and at most "
        f"{MAX_WINDOW}; earlier windows have the same length. Below {MIN_STEPS} logged steps there "
        "is no verdict.",
        "Chance alone makes MaxVio positive: it is the expected value for a perfectly balanced "
        "router with as many tokens per expert, and is subtracted before every comparison. Where "
        "half of it is more than a limit or rise named here, that half takes its place.",
        f"Collapsing: over the whole window one expert got so much that MaxVio of the summed "
        f"counts is {limit}; or at least "
        f"{IDLE_COLLAPSE:.0%} of a layer's experts are idle, with less than {IDLE_LOAD:.0%} of "
        "their share; and neither is receding.",
        f"Drifting: a layer's mean MaxVio is at least {DRIFT_RATIO:g} times that of two earlier "
        f"windows in a row, higher by at least {DRIFT_RISE:g} and by {DRIFT_ERRORS:g} standard "
        f"errors, and within 10% of its highest value since; or "
        f"the range of its bias exceeds {BIAS_RANGE:g} (router scores lie between 0 and 1) and "
        f"still grows linearly: over the last two fifths of the run by at least {BIAS_GROWTH:.0%}, "
        f"and at least {BIAS_LINEAR:.0%} as much as over the two fifths before, while MaxVio does "
        "not fall.",
        f"Balanced: the average layer's mean MaxVio is at most {MEAN_LIMIT:g}, every layer's at "
        f"most {LAYER_LIMIT:g}, and at most {IDLE_LIMIT:.0%} of a layer's experts are idle.",
        f"Otherwise settling if in every layer beyond a limit the excess has fallen to "
        f"{RECOVERY:.0%} or less within the last two windows and still falls, else unbalanced.",
        f"A run that has never been balanced is settling, and neither drifting nor collapsing, as "
        f"long as its bias builds up: a range of at most {BIAS_RANGE:g} that grew by at least "
        f"{BIAS_GROWTH:.0%} over the last two fifths of the run.",
        "The state of the run is that of its worst layer.",
    )


class _Blocks:
    """Window means, the last window last; those that do not fill a window are left out.

    Attributes:
        window: Logged steps of a window.
        violation: Mean MaxVio, ``[num_blocks, num_layers]``.
        error: Its standard error, same shape.
        noise: What chance gives, same shape.
        loads: Loads over a whole window relative to their mean, ``[num_blocks, layers, experts]``.
        tokens: Tokens per expert in a window, ``[num_blocks, layers]``.
    """

    def __init__(self, tokens_per_expert: np.ndarray, window: int) -> None:
        num_blocks = len(tokens_per_expert) // window
        counts = tokens_per_expert[-num_blocks * window :]
        shape = (num_blocks, window, *counts.shape[1:])
        violation = max_violation(torch.from_numpy(counts)).numpy().reshape(shape[:3])
        sums = counts.reshape(shape).sum(axis=1)
        self.window = window
        self.num_experts = counts.shape[2]
        self.violation = violation.mean(axis=1)
        self.error = violation.std(axis=1, ddof=1) / math.sqrt(window)
        self.tokens = sums.mean(axis=2)
        self.noise = sampling_noises(self.tokens / window, self.num_experts)
        self.loads = load_share(torch.from_numpy(sums)).numpy()

    @property
    def excess(self) -> np.ndarray:
        """Mean MaxVio beyond chance, ``[num_blocks, num_layers]``."""
        return np.maximum(self.violation - self.noise, 0.0)

    @property
    def persistent(self) -> np.ndarray:
        """MaxVio of the last window's summed counts beyond chance, ``[num_layers]``."""
        noise = sampling_noises(self.tokens[-1], self.num_experts)
        return np.maximum(self.loads[-1].max(axis=-1) - 1.0 - noise, 0.0)

    def idle(self, block: int) -> np.ndarray:
        """Number of idle experts in a window, ``[num_layers]``."""
        enough = self.tokens[block] >= IDLE_MIN_TOKENS
        return np.where(enough, (self.loads[block] < IDLE_LOAD).sum(axis=-1), 0)


def _judge_layers(
    names: list[str],
    steps: np.ndarray,
    blocks: _Blocks,
    expert_bias: np.ndarray | None,
    topk: int | None,
) -> tuple[LayerVerdict, ...]:
    limit = collapse_limit(blocks.num_experts, topk)
    bias = _Bias(expert_bias, len(names))
    # In its first phase a run is far from balance until the bias has grown to what the scores need.
    never_balanced = (blocks.excess[:-1] > MEAN_LIMIT).all(axis=0)
    building = never_balanced & bias.builds_up
    risen_from = np.where(building, -1, _risen_from(blocks))
    bias_drifts = bias.drifts & ~_falls(blocks.excess)
    hot, many_idle = (flags & ~building for flags in _collapsing(blocks, limit))
    over, recovering = _over_limit(blocks)
    layers = []
    for index, name in enumerate(names):
        loads, idle = blocks.loads[-1, index], int(blocks.idle(-1)[index])
        state: State = "balanced"
        reason = ""
        if hot[index] or many_idle[index]:
            state = "collapsing"
            reason = _collapse_reason(hot[index], many_idle[index], loads, limit, idle)
        elif risen_from[index] >= 0 or bias_drifts[index]:
            state = "drifting"
            reason = _drift_reason(index, int(risen_from[index]), steps, blocks, bias)
        elif over[index]:
            state = "settling" if recovering[index] or building[index] else "unbalanced"
            reason = _over_reason(index, blocks, idle)
            if building[index]:
                reason += f", the bias still builds up (range {bias.range[index]:.2f})"
        layers.append(
            LayerVerdict(
                name=name,
                state=state,
                violation=float(blocks.violation[-1, index]),
                noise=float(blocks.noise[-1, index]),
                best=float(blocks.violation[:-1, index].min()),
                busiest=int(loads.argmax()),
                busiest_load=float(loads.max()),
                idle=idle,
                bias_range=float(bias.range[index]),
                reason=reason,
            )
        )
    return tuple(layers)


def _collapsing(blocks: _Blocks, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Layers that one expert dominates, and layers with many idle experts; none that recovers."""
    idle = blocks.idle(-1)
    hot = (blocks.persistent >= limit) & ~_falls(blocks.excess)
    many_idle = (idle >= IDLE_COLLAPSE * blocks.num_experts) & (idle > RECOVERY * blocks.idle(-3))
    return hot, many_idle


def _over_limit(blocks: _Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Layers beyond a limit of balance, and whether they come down."""
    excess, idle = blocks.excess, blocks.idle(-1)
    noise = blocks.noise[-1]
    on_average = excess[-1].mean() <= tolerance(MEAN_LIMIT, noise).mean()
    too_high = excess[-1] > tolerance(LAYER_LIMIT if on_average else MEAN_LIMIT, noise)
    too_idle = idle > IDLE_LIMIT * blocks.num_experts
    fewer_idle = idle <= RECOVERY * blocks.idle(-3)
    recovering = (_falls(excess) | ~too_high) & (fewer_idle | ~too_idle)
    return too_high | too_idle, recovering


def _falls(values: np.ndarray) -> np.ndarray:
    """Whether the last window is well below the one two earlier, and below the one before."""
    return (values[-1] <= RECOVERY * values[-3]) & (values[-1] < values[-2])


def _risen_from(blocks: _Blocks) -> np.ndarray:
    """The window with the lowest MaxVio from which each layer has drifted, or -1."""
    excess, last = blocks.excess, blocks.excess[-1]
    found = np.full(len(last), -1)
    lowest = np.full(len(last), np.inf)
    margin = tolerance(DRIFT_RISE, blocks.noise[-1])
    for block in range(1, len(excess) - 1):
        level = excess[block - 1 : block + 1].max(axis=0)  # two low windows are not an accident
        error = np.hypot(blocks.error[-1], blocks.error[block - 1 : block + 1].max(axis=0))
        risen = (last >= DRIFT_RATIO * level) & (last - level >= margin)
        risen &= last - level >= DRIFT_ERRORS * error
        # A rise that has been taken back, as after the first steps of a run, is none.
        risen &= last >= 0.9 * excess[block + 1 :].max(axis=0)
        better = risen & (level < lowest)
        found[better], lowest[better] = block, level[better]
    return found


class _Bias:
    """Range (largest minus smallest bias) of each layer and how it grows.

    Attributes:
        range: Mean over the last window, ``[num_layers]``; NaN without a record.
        builds_up: It is small and has grown over the last two fifths of the run.
        drifts: It is large and grows without slowing down.
    """

    def __init__(self, expert_bias: np.ndarray | None, num_layers: int) -> None:
        self.range = np.full(num_layers, np.nan)
        self.builds_up = self.drifts = np.zeros(num_layers, dtype=bool)
        if expert_bias is None or len(expert_bias) < MIN_STEPS:
            return
        ranges = expert_bias.max(axis=-1) - expert_bias.min(axis=-1)  # [steps, layers]
        window = window_length(len(ranges))
        fifths = 2 * len(ranges) // 5
        now, middle, start = (
            ranges[len(ranges) - shift - window : len(ranges) - shift].mean(axis=0)
            for shift in (0, fifths, min(2 * fifths, len(ranges) - window))
        )
        grows = now - middle >= BIAS_GROWTH * now
        self.range = now
        self.builds_up = grows & (now > 0) & (now <= BIAS_RANGE)
        linear = now - middle >= BIAS_LINEAR * (middle - start)
        self.drifts = grows & linear & (now > BIAS_RANGE)


def _collapse_reason(hot: bool, many_idle: bool, loads: np.ndarray, limit: float, idle: int) -> str:
    parts = []
    if hot:
        share = f"{loads.max():.1f} times its share (limit {1 + limit:.1f})"
        parts.append(f"expert {loads.argmax()} got {share}")
    if many_idle:
        parts.append(_count_idle(idle, len(loads)))
    return " and ".join(parts)


def _over_reason(index: int, blocks: _Blocks, idle: int) -> str:
    now, before = blocks.violation[-1, index], blocks.violation[-3, index]
    text = f"MaxVio {now:.2f}, {before:.2f} two windows before"
    return text + (f", {_count_idle(idle, blocks.num_experts)}" if idle else "")


def _drift_reason(index: int, block: int, steps: np.ndarray, blocks: _Blocks, bias: _Bias) -> str:
    if block < 0:
        return f"the bias keeps growing linearly, its range is {bias.range[index]:.2f}"
    start = len(steps) - (len(blocks.violation) - block) * blocks.window
    first, last = steps[start], steps[start + blocks.window - 1]
    return (
        f"MaxVio rose from {blocks.violation[block, index]:.2f} (steps {first} to {last}) to "
        f"{blocks.violation[-1, index]:.2f}"
    )


def _count_idle(idle: int, num_experts: int) -> str:
    return f"{idle} of {num_experts} experts {'was' if idle == 1 else 'were'} idle"


def _judge_run(
    layers: tuple[LayerVerdict, ...], blocks: _Blocks, num_layers: int
) -> tuple[State, tuple[LayerVerdict, ...], str]:
    idle = sum(layer.idle for layer in layers)
    summary = _summary(layers, blocks, idle)
    for state, words in _STATE_WORDS:
        if worst := _worst(layers, state):
            text = f"{_heading(worst, num_layers, words)} {_name_layers(worst)}. {summary}"
            helped = f" {WHAT_HELPED}" if state in ("collapsing", "drifting") else ""
            return state, worst, text + helped
    return "balanced", (), summary


def _worst(layers: tuple[LayerVerdict, ...], state: State) -> tuple[LayerVerdict, ...]:
    chosen = (layer for layer in layers if layer.state == state)
    return tuple(sorted(chosen, key=lambda layer: (-layer.violation, -layer.idle)))


def _heading(worst: tuple[LayerVerdict, ...], num_layers: int, words: str) -> str:
    if len(worst) == num_layers > 1:
        return f"All {num_layers} MoE layers are {words}:"
    verb = "is" if len(worst) == 1 else "are"
    return f"{len(worst)} of {num_layers} MoE layers {verb} {words}:"


def _name_layers(layers: tuple[LayerVerdict, ...], most: int = 3) -> str:
    named = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers[:most])
    return named + (f"; and {len(layers) - most} more" if len(layers) > most else "")


def _summary(layers: tuple[LayerVerdict, ...], blocks: _Blocks, idle: int) -> str:
    violation = float(np.mean([layer.violation for layer in layers]))
    noise = np.array([layer.noise for layer in layers])
    total = len(layers) * blocks.num_experts
    limit = float(np.mean(noise + tolerance(MEAN_LIMIT, noise)))
    none_idle = "no expert was idle" if idle == 0 else _count_idle(idle, total)
    text = (
        f"Over the last {blocks.window} logged steps the busiest expert of an average layer got "
        f"{1 + violation:.2f} times its share (MaxVio {violation:.2f}; limit "
        f"{limit:.2f}) and {none_idle}."
    )
    if noise.mean() >= 0.01:
        tokens = float(blocks.tokens[-1].mean()) / blocks.window
        text += (
            f" Chance alone gives {noise.mean():.2f} with {tokens:.0f} tokens per expert and step."
        )
    return text
