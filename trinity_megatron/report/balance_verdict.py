"""Does the load of the experts stay balanced?  A verdict on token counts, in plain words."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trinity_megatron.report.balance_findings import Findings
from trinity_megatron.report.balance_thresholds import THRESHOLDS, Thresholds, widen_by_noise
from trinity_megatron.report.balance_windows import BiasGrowth, LoadWindows

State = Literal["balanced", "settling", "unbalanced", "drifting", "collapsing", "too short"]

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
    """The verdict on a run.

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
    thresholds: Thresholds = THRESHOLDS,
) -> Verdict:
    """Judge a run by its last window against its earlier ones.

    Args:
        steps: Logged steps in ascending order, ``[num_steps]``.
        tokens_per_expert: Counts, ``[num_steps, num_layers, num_experts]``.
        expert_bias: Bias at the same or at other steps, ``[any, num_layers, num_experts]``.
        topk: Experts per token; None if unknown.
        layer_names: ``[num_layers]``; ``MoE layer k`` if None.
        thresholds: Thresholds of the rules.

    Returns:
        The verdict; :func:`balance_thresholds.describe_rules` says in words how it is reached.
    """
    num_steps, num_layers, _ = tokens_per_expert.shape
    min_steps = thresholds.min_steps
    if num_steps < min_steps:
        text = f"The run has {num_steps} logged steps; a verdict needs at least {min_steps}."
        return Verdict("too short", text)
    names = layer_names or [f"MoE layer {index + 1}" for index in range(num_layers)]
    windows = LoadWindows(tokens_per_expert, thresholds)
    bias = BiasGrowth(expert_bias, num_layers, thresholds)
    findings = Findings.of_run(windows, bias, topk, thresholds)
    layers = tuple(
        _judge_layer(index, name, steps, windows, bias, findings)
        for index, name in enumerate(names)
    )
    state, worst, text = _judge_run(layers, windows, thresholds)
    first, last = int(steps[-windows.window]), int(steps[-1])
    return Verdict(state, text, layers, worst, first, last, windows.window)


def _judge_layer(
    index: int,
    name: str,
    steps: np.ndarray,
    windows: LoadWindows,
    bias: BiasGrowth,
    findings: Findings,
) -> LayerVerdict:
    state, reason = _state_of_layer(index, steps, windows, bias, findings)
    loads = windows.loads[-1, index]
    return LayerVerdict(
        name=name,
        state=state,
        violation=float(windows.violation[-1, index]),
        noise=float(windows.noise[-1, index]),
        best=float(windows.violation[:-1, index].min()),
        busiest=int(loads.argmax()),
        busiest_load=float(loads.max()),
        idle=int(findings.idle[index]),
        bias_range=float(bias.range[index]),
        reason=reason,
    )


def _state_of_layer(
    index: int, steps: np.ndarray, windows: LoadWindows, bias: BiasGrowth, findings: Findings
) -> tuple[State, str]:
    """State of a layer and the clause that says why."""
    if findings.is_dominated[index] or findings.has_many_idle[index]:
        return "collapsing", _collapse_reason(index, windows, findings)
    if findings.drift_window[index] >= 0:
        return "drifting", _drift_reason(index, steps, windows, findings)
    if findings.bias_drifts[index]:
        range_now = f"{bias.range[index]:.2f}"
        return "drifting", f"the bias keeps growing linearly, its range is {range_now}"
    if findings.is_over_limit[index]:
        settles = findings.is_recovering[index] or findings.is_building[index]
        reason = _over_limit_reason(index, windows, bias, findings)
        return ("settling" if settles else "unbalanced"), reason
    return "balanced", ""


def _collapse_reason(index: int, windows: LoadWindows, findings: Findings) -> str:
    loads = windows.loads[-1, index]
    parts = []
    if findings.is_dominated[index]:
        share = f"{loads.max():.1f} times its share (limit {1 + findings.collapse_limit:.1f})"
        parts.append(f"expert {loads.argmax()} got {share}")
    if findings.has_many_idle[index]:
        parts.append(_count_idle(int(findings.idle[index]), len(loads)))
    return " and ".join(parts)


def _drift_reason(index: int, steps: np.ndarray, windows: LoadWindows, findings: Findings) -> str:
    from_window = int(findings.drift_window[index])
    start = len(steps) - (len(windows.violation) - from_window) * windows.window
    first, last = steps[start], steps[start + windows.window - 1]
    before, now = windows.violation[from_window, index], windows.violation[-1, index]
    return f"MaxVio rose from {before:.2f} (steps {first} to {last}) to {now:.2f}"


def _over_limit_reason(
    index: int, windows: LoadWindows, bias: BiasGrowth, findings: Findings
) -> str:
    before, now = windows.violation[-3, index], windows.violation[-1, index]
    text = f"MaxVio {now:.2f}, {before:.2f} two windows before"
    if idle := int(findings.idle[index]):
        text += f", {_count_idle(idle, windows.num_experts)}"
    if findings.is_building[index]:
        text += f", the bias still builds up (range {bias.range[index]:.2f})"
    return text


def _count_idle(idle: int, num_experts: int) -> str:
    return f"{idle} of {num_experts} experts {'was' if idle == 1 else 'were'} idle"


def _judge_run(
    layers: tuple[LayerVerdict, ...], windows: LoadWindows, thresholds: Thresholds
) -> tuple[State, tuple[LayerVerdict, ...], str]:
    """State of the worst layer, the layers in that state, and the text of the verdict."""
    summary = _summarize_window(layers, windows, thresholds)
    for state, words in _STATE_WORDS:
        if worst := _layers_in_state(layers, state):
            heading = _count_layers(len(worst), len(layers), words)
            text = f"{heading} {_name_layers(worst)}. {summary}"
            if state in ("collapsing", "drifting"):
                text += f" {WHAT_HELPED}"
            return state, worst, text
    return "balanced", (), summary


def _layers_in_state(layers: tuple[LayerVerdict, ...], state: State) -> tuple[LayerVerdict, ...]:
    """The layers in a state, highest MaxVio first."""
    chosen = [layer for layer in layers if layer.state == state]
    return tuple(sorted(chosen, key=lambda layer: (-layer.violation, -layer.idle)))


def _count_layers(num_worst: int, num_layers: int, words: str) -> str:
    if num_worst == num_layers > 1:
        return f"All {num_layers} MoE layers are {words}:"
    verb = "is" if num_worst == 1 else "are"
    return f"{num_worst} of {num_layers} MoE layers {verb} {words}:"


def _name_layers(layers: tuple[LayerVerdict, ...], most: int = 3) -> str:
    named = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers[:most])
    return named + (f"; and {len(layers) - most} more" if len(layers) > most else "")


def _summarize_window(
    layers: tuple[LayerVerdict, ...], windows: LoadWindows, thresholds: Thresholds
) -> str:
    """MaxVio of the last window, its limit, idle experts, and what chance gives."""
    violation = float(np.mean([layer.violation for layer in layers]))
    noise = np.array([layer.noise for layer in layers])
    limit = float(np.mean(noise + widen_by_noise(thresholds.average_limit, noise)))
    idle = sum(layer.idle for layer in layers)
    num_experts = len(layers) * windows.num_experts
    idle_words = "no expert was idle" if idle == 0 else _count_idle(idle, num_experts)
    text = (
        f"Over the last {windows.window} logged steps the busiest expert of an average layer got "
        f"{1 + violation:.2f} times its share (MaxVio {violation:.2f}; limit {limit:.2f}) and "
        f"{idle_words}."
    )
    if noise.mean() >= 0.01:
        tokens = float(windows.tokens[-1].mean()) / windows.window
        text += (
            f" Chance alone gives {noise.mean():.2f} with {tokens:.0f} tokens per expert and step."
        )
    return text
