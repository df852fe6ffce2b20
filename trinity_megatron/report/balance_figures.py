"""Figures of the balance of the experts of a run: MaxVio, load and bias.

Each function takes the history of a run and returns a figure, or None if the run has not recorded
what the figure shows.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trinity_megatron.errors import UserError
from trinity_megatron.report.balance_thresholds import THRESHOLDS, widen_by_noise
from trinity_megatron.report.balance_windows import sampling_noises
from trinity_megatron.report.charts import (
    BLUE,
    FEW_LAYERS,
    INK,
    MAX_COLUMNS,
    MUTED,
    ORANGE,
    RED,
    SKY,
    WIDTH,
    Line,
    Panel,
    draw_panels,
    finish,
    layer_panels,
    plot_bands,
    plot_layers,
    put_legend_outside,
    use_log_axis,
)
from trinity_megatron.report.figures import save
from trinity_megatron.report.heat_maps import (
    LOAD_LEVELS,
    NUM_ROWS,
    VIOLATION_LEVELS,
    add_colorbar,
    draw_heat_map,
    pool_experts,
)
from trinity_megatron.report.history import RunHistory, Series, bin_steps, mean_bins, sum_bins
from trinity_megatron.telemetry.tensorboard_log import TOKENS_TAG, RunLog


def draw_expert_load(log: RunLog, path: Path) -> None:
    """Draw the load of every expert over the steps, one heat map a layer.

    Args:
        log: The run; must hold token counts.
        path: PNG to write.

    Raises:
        UserError: The run has no token counts.
    """
    figure = expert_load_figure(RunHistory(log))
    if figure is None:
        raise UserError(f"The run has no {TOKENS_TAG!r}: it trained no MoE layer.")
    save(figure, path)


def violation_map_figure(history: RunHistory) -> Figure | None:
    """MaxVio of every layer over the steps as one heat map."""
    if not history.has_experts:
        return None
    edges, bins = bin_steps(history.steps, MAX_COLUMNS)
    violation = mean_bins(history.violation, bins, len(edges) - 1)
    num_layers = history.num_layers
    figure = Figure(figsize=(WIDTH, 1.7 + min(4.2, 0.25 * num_layers)), layout="constrained")
    axis = figure.subplots()
    image = draw_heat_map(axis, violation.T, edges, "YlOrRd", VIOLATION_LEVELS, extend="max")
    image.axes.invert_yaxis()
    ticks = VIOLATION_LEVELS if num_layers > FEW_LAYERS else VIOLATION_LEVELS[1::2]
    figure.colorbar(image, ax=axis, label="MaxVio", ticks=ticks, spacing="uniform", format="%g")
    named_every = -(-num_layers // 18)  # at most 18 names fit
    axis.set_yticks(range(0, num_layers, named_every), history.layer_names[::named_every])
    axis.set_xlabel("step")
    return finish(figure)


def violation_figure(history: RunHistory) -> Figure | None:
    """MaxVio of the layers over the steps as lines; without token counts its mean and maximum."""
    if not history.has_experts:
        lines = [
            Line("highest layer", history.series("moe/max_violation"), RED),
            Line("mean of the layers", history.series("moe/mean_max_violation"), BLUE),
        ]
        return draw_panels(history, [Panel("MaxVio", lines, "from zero")])
    edges, bins = bin_steps(history.steps, MAX_COLUMNS)
    violation = mean_bins(history.violation, bins, len(edges) - 1)
    noise = mean_bins(_noise_of_steps(history), bins, len(edges) - 1)
    limit = noise + widen_by_noise(THRESHOLDS.average_limit, noise)
    middle = (edges[:-1] + edges[1:]) / 2
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axis = figure.subplots()
    plot_layers(axis, middle, violation, history.layer_names)
    axis.plot(middle, limit, "--", color=INK, linewidth=1, label="limit (average)")
    axis.plot(middle, noise, ":", color=INK, linewidth=1, label="chance alone")
    largest = np.nanmax(violation)
    if largest > 8 * max(float(np.nanmedian(violation)), 0.05):
        use_log_axis(axis)
    else:
        axis.set_ylim(bottom=0)
    axis.set_ylabel("MaxVio")
    axis.set_xlabel("step")
    put_legend_outside(axis)
    return finish(figure)


def _noise_of_steps(history: RunHistory) -> np.ndarray:
    """MaxVio that chance alone gives in each step, ``[num_steps]``."""
    return sampling_noises(history.tokens_per_expert.mean(axis=(1, 2)), history.num_experts)


def expert_load_figure(history: RunHistory) -> Figure | None:
    """Load of the experts over the steps, one strip a layer."""
    if not history.has_experts:
        return None
    num_columns = _num_strip_columns(history.num_layers)
    has_shared_rows = history.num_experts > NUM_ROWS
    edges, bins = bin_steps(history.steps, MAX_COLUMNS // num_columns)
    counts = sum_bins(history.tokens_per_expert, bins, len(edges) - 1)
    mean = counts.mean(axis=-1, keepdims=True)
    loads = np.divide(counts, mean, out=np.full_like(counts, np.nan), where=mean > 0)
    figure, axes = layer_panels(
        history,
        num_columns,
        height=1.5 if num_columns == 1 else 0.62,
        left=0.01 if has_shared_rows else 0.055,
    )
    image = None
    for layer, axis in enumerate(axes):
        rows = pool_experts(loads[:, layer])
        image = draw_heat_map(axis, rows.T, edges, "RdBu_r", LOAD_LEVELS, extend="both")
        if has_shared_rows:
            axis.set_yticks([])
            axis.yaxis.set_visible(False)
        elif num_columns == 1:
            axis.set_ylabel("expert")
    assert image is not None
    add_colorbar(figure, image, "load / mean load of the layer (1 = its share)")
    return finish(figure)


def _num_strip_columns(num_layers: int) -> int:
    if num_layers <= FEW_LAYERS:
        return 1
    return 3 if num_layers <= 24 else 4


def load_spread_figure(history: RunHistory) -> Figure | None:
    """Quantiles of the load, entropy and dead experts over the steps."""
    quantiles = [
        Line("highest", _clip_load(history.series("moe/load_max")), RED),
        Line("90%", _clip_load(history.series("moe/load_q90")), ORANGE),
        Line("median", _clip_load(history.series("moe/load_median")), INK),
        Line("10%", _clip_load(history.series("moe/load_q10")), SKY),
        Line("lowest", _clip_load(history.series("moe/load_min")), BLUE),
    ]
    entropy = [
        Line("mean of the layers", history.series("moe/load_entropy"), BLUE),
        Line("lowest layer", history.series("moe/load_entropy_min"), RED),
    ]
    dead = [
        Line("in the step", history.series("moe/dead_experts"), SKY),
        Line("in the last 100 steps", history.series("moe/dead_experts_window"), RED),
    ]
    panels = [
        Panel("load / mean load", quantiles, "logarithmic"),
        Panel("entropy of the load", entropy),
        Panel("experts without a token", dead, "from zero"),
    ]
    return draw_panels(history, panels)


def _clip_load(series: Series) -> Series:
    """Loads of at least 0.01: a logarithmic axis has no zero."""
    return Series(series.steps, np.maximum(series.values, 0.01))


def expert_bias_figure(history: RunHistory) -> Figure | None:
    """Biases of the experts over the steps, one panel a layer."""
    if not history.bias_steps.size:
        return None
    num_layers, num_experts = history.expert_bias.shape[1:]
    has_few_layers = num_layers <= FEW_LAYERS
    shows_every_expert = has_few_layers and num_experts <= NUM_ROWS
    edges, bins = bin_steps(history.bias_steps, MAX_COLUMNS if has_few_layers else 120)
    bias = mean_bins(history.expert_bias, bins, len(edges) - 1)
    middle = (edges[:-1] + edges[1:]) / 2
    figure, axes = layer_panels(
        history,
        1 if has_few_layers else 6,
        height=1.7 if has_few_layers else 1.0,
        legend=0.5 if shows_every_expert else 0.75,
        num_layers=num_layers,
    )
    highest = float(np.nanmax(np.abs(bias))) * 1.05 or 1.0
    for layer, axis in enumerate(axes):
        if shows_every_expert:
            axis.plot(middle, bias[:, layer], color=BLUE, alpha=0.45, linewidth=0.7)
        else:
            plot_bands(axis, middle, bias[:, layer])
        axis.axhline(0, color=MUTED, linewidth=0.6)
        axis.set_ylim(-highest, highest)
        axis.set_xlim(edges[0], edges[-1])
    if not shows_every_expert:
        _add_bands_legend(figure, axes[0])
    return finish(figure)


def _add_bands_legend(figure: Figure, axis: Axes) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=8.5
    )
