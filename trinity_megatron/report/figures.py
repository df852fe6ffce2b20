"""The pictures of a run: functions of its history that return a figure, or None without data.

They are drawn without pyplot: no display, no global state in a training process.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trinity_megatron.errors import UserError
from trinity_megatron.report.balance_verdict import MEAN_LIMIT, sampling_noises, tolerance
from trinity_megatron.report.charts import (
    BLUE,
    COLORS,
    DPI,
    FEW_LAYERS,
    GREEN,
    INK,
    LOAD_LEVELS,
    MAX_COLUMNS,
    MUTED,
    NUM_ROWS,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    VIOLATION_LEVELS,
    WIDTH,
    add_colorbar,
    draw_heat_map,
    draw_panels,
    finish,
    label_tokens,
    layer_panels,
    plot_bands,
    plot_layers,
    plot_series,
    pool_experts,
    put_legend_outside,
    tokens_or_steps,
    use_log_axis,
)
from trinity_megatron.report.history import RunHistory, Series, bin_steps, mean_bins, sum_bins
from trinity_megatron.telemetry.step_statistics import GRADIENT_GROUPS
from trinity_megatron.telemetry.tensorboard_log import TOKENS_TAG, RunLog


def draw_loss(log: RunLog, path: Path, *, unigram_entropy: float | None = None) -> None:
    """Draw training and validation loss over the tokens, or over the steps.

    Args:
        log: The run.
        path: PNG to write.
        unigram_entropy: Entropy in nats per token to draw as a line.
    """
    figure = loss_figure(RunHistory(log), unigram_entropy=unigram_entropy)
    if figure is None:
        raise UserError("The run has no 'lm loss': it has not finished a step.")
    save(figure, path)


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


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def loss_figure(history: RunHistory, *, unigram_entropy: float | None = None) -> Figure | None:
    """Training and validation loss against the tokens seen."""
    train, valid = history.series("lm loss"), history.series("lm loss validation").finite
    if not len(train.finite):
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axis = figure.subplots()
    plot_series(axis, train, BLUE, "training", x=tokens_or_steps(history))
    if len(valid):
        x = tokens_or_steps(history)(valid.steps)
        axis.plot(x, valid.values, "o-", color=RED, label="validation", markersize=4)
    if unigram_entropy is not None:
        axis.axhline(unigram_entropy, color=MUTED, linestyle="--", label="unigram entropy")
    label_tokens(axis, history)
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False)
    return finish(figure)


def schedule_figure(history: RunHistory) -> Figure | None:
    """Learning rates and batch size."""
    rates = [
        (name, history.series(tag), color)
        for name, tag, color in (
            ("Muon", "lr/muon", BLUE),
            ("AdamW", "lr/adamw", ORANGE),
        )
    ]
    if not any(len(series) for _, series, _ in rates):
        rates = [("learning rate", history.series("learning-rate"), BLUE)]
    return draw_panels(
        history,
        [
            ("learning rate", rates),
            ("batch size (sequences)", [("", history.series("batch-size"), INK)]),
        ],
        against_tokens=True,
        from_zero=("learning rate", "batch size (sequences)"),
    )


def violation_map_figure(history: RunHistory) -> Figure | None:
    """MaxVio of every layer over the steps as one heat map."""
    if not history.has_experts:
        return None
    edges, bins = bin_steps(history.steps, MAX_COLUMNS)
    violation = mean_bins(history.violation, bins, len(edges) - 1)
    layers = history.num_layers
    figure = Figure(figsize=(WIDTH, 1.7 + min(4.2, 0.25 * layers)), layout="constrained")
    axis = figure.subplots()
    image = draw_heat_map(axis, violation.T, edges, "YlOrRd", VIOLATION_LEVELS, extend="max")
    image.axes.invert_yaxis()
    ticks = VIOLATION_LEVELS if layers > FEW_LAYERS else VIOLATION_LEVELS[1::2]
    figure.colorbar(image, ax=axis, label="MaxVio", ticks=ticks, spacing="uniform", format="%g")
    every = -(-layers // 18)
    axis.set_yticks(range(0, layers, every), history.layer_names[::every])
    axis.set_xlabel("step")
    return finish(figure)


def violation_figure(history: RunHistory) -> Figure | None:
    """MaxVio of the layers over the steps as lines."""
    if not history.has_experts:
        return draw_panels(
            history,
            [
                (
                    "MaxVio",
                    [
                        ("highest layer", history.series("moe/max_violation"), RED),
                        ("mean of the layers", history.series("moe/mean_max_violation"), BLUE),
                    ],
                )
            ],
            from_zero=("MaxVio",),
        )
    edges, bins = bin_steps(history.steps, MAX_COLUMNS)
    violation = mean_bins(history.violation, bins, len(edges) - 1)
    middle = (edges[:-1] + edges[1:]) / 2
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axis = figure.subplots()
    plot_layers(axis, middle, violation, history.layer_names)
    noise = mean_bins(_noise(history), bins, len(edges) - 1)
    axis.plot(
        middle,
        noise + tolerance(MEAN_LIMIT, noise),
        "--",
        color=INK,
        linewidth=1,
        label="limit (average)",
    )
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


def _noise(history: RunHistory) -> np.ndarray:
    """MaxVio that chance alone gives in each step, ``[num_steps]``."""
    return sampling_noises(history.tokens_per_expert.mean(axis=(1, 2)), history.num_experts)


def expert_load_figure(history: RunHistory) -> Figure | None:
    """Load of the experts over the steps, one strip a layer."""
    if not history.has_experts:
        return None
    columns = 1 if history.num_layers <= FEW_LAYERS else 3 if history.num_layers <= 24 else 4
    edges, bins = bin_steps(history.steps, MAX_COLUMNS // columns)
    counts = sum_bins(history.tokens_per_expert, bins, len(edges) - 1)
    mean = counts.mean(axis=-1, keepdims=True)
    loads = np.divide(counts, mean, out=np.full_like(counts, np.nan), where=mean > 0)
    figure, axes = layer_panels(
        history,
        columns,
        height=1.5 if columns == 1 else 0.62,
        left=0.01 if history.num_experts > NUM_ROWS else 0.055,
    )
    image = None
    for layer, axis in enumerate(axes):
        rows = pool_experts(loads[:, layer])
        image = draw_heat_map(axis, rows.T, edges, "RdBu_r", LOAD_LEVELS, extend="both")
        if history.num_experts > NUM_ROWS:
            axis.set_yticks([])
            axis.yaxis.set_visible(False)
        elif columns == 1:
            axis.set_ylabel("expert")
    assert image is not None
    add_colorbar(figure, image, "load / mean load of the layer (1 = its share)")
    return finish(figure)


def load_spread_figure(history: RunHistory) -> Figure | None:
    """Quantiles of the load, entropy and dead experts over the steps."""
    quantiles = [
        (name, Series(series.steps, np.maximum(series.values, 0.01)), color)
        for name, tag, color in (
            ("highest", "moe/load_max", RED),
            ("90%", "moe/load_q90", ORANGE),
            ("median", "moe/load_median", INK),
            ("10%", "moe/load_q10", SKY),
            ("lowest", "moe/load_min", BLUE),
        )
        for series in [history.series(tag)]
    ]
    entropy = [
        ("mean of the layers", history.series("moe/load_entropy"), BLUE),
        ("lowest layer", history.series("moe/load_entropy_min"), RED),
    ]
    dead = [
        ("in the step", history.series("moe/dead_experts"), SKY),
        ("in the last 100 steps", history.series("moe/dead_experts_window"), RED),
    ]
    return draw_panels(
        history,
        [
            ("load / mean load", quantiles),
            ("entropy of the load", entropy),
            ("experts without a token", dead),
        ],
        from_zero=("experts without a token",),
        log=("load / mean load",),
    )


def expert_bias_figure(history: RunHistory) -> Figure | None:
    """Biases of the experts over the steps, one panel a layer."""
    if not history.bias_steps.size:
        return None
    num_layers, num_experts = history.expert_bias.shape[1:]
    few = num_layers <= FEW_LAYERS
    lines = few and num_experts <= NUM_ROWS
    edges, bins = bin_steps(history.bias_steps, MAX_COLUMNS if few else 120)
    bias = mean_bins(history.expert_bias, bins, len(edges) - 1)
    middle = (edges[:-1] + edges[1:]) / 2
    figure, axes = layer_panels(
        history,
        1 if few else 6,
        height=1.7 if few else 1.0,
        legend=0.5 if lines else 0.75,
        names=num_layers,
    )
    highest = float(np.nanmax(np.abs(bias))) * 1.05 or 1.0
    for layer, axis in enumerate(axes):
        values = bias[:, layer]
        if lines:
            axis.plot(middle, values, color=BLUE, alpha=0.45, linewidth=0.7)
        else:
            plot_bands(axis, middle, values)
        axis.axhline(0, color=MUTED, linewidth=0.6)
        axis.set_ylim(-highest, highest)
        axis.set_xlim(edges[0], edges[-1])
    if not lines:
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="lower center",
            ncols=3,
            frameon=False,
            fontsize=8.5,
        )
    return finish(figure)


def logits_figure(history: RunHistory) -> Figure | None:
    """Logits of the routers, of the LM head and of attention over the steps."""
    router = [
        ("highest", history.series("router/max_logit"), RED),
        ("mean", history.series("router/mean_logit"), BLUE),
        ("standard deviation", history.series("router/logit_std"), GREEN),
    ]
    head = [
        ("highest", history.series("lm_head/max_logit"), RED),
        ("mean logsumexp", history.series("lm_head/mean_logsumexp"), ORANGE),
        ("mean", history.series("lm_head/mean_logit"), BLUE),
    ]
    return draw_panels(
        history,
        [
            ("router logits", router),
            ("LM-head logits", head),
            ("LM-head z-loss", [("", history.series("lm_head/z_loss"), PURPLE)]),
            (
                "bound of the attention logits",
                [("", history.series("attention/max_logit_bound"), INK)],
            ),
        ],
    )


def gradient_norm_figure(history: RunHistory) -> Figure | None:
    """Gradient norm in total and by group of parameters over the steps."""
    groups = [
        (name.replace("_", " "), history.series(f"grad_norm/{name}"), color)
        for name, color in zip(GRADIENT_GROUPS, COLORS, strict=True)
    ]
    return draw_panels(
        history,
        [
            ("gradient norm, all", [("", history.series("grad-norm"), INK)]),
            ("gradient norm by group", groups),
        ],
        log=("gradient norm, all", "gradient norm by group"),
    )


def data_figure(history: RunHistory) -> Figure | None:
    """Heterogeneity of the batches and the sequence-wise balance loss over the steps."""
    return draw_panels(
        history,
        [
            ("BatchHet (nats per token)", [("", history.series("data/batch_het"), BLUE)]),
            (
                "sequence-wise balance loss",
                [("", history.series("seq_load_balancing_loss"), GREEN)],
            ),
        ],
    )


def throughput_figure(history: RunHistory) -> Figure | None:
    """Tokens per second, model FLOPs utilisation and time of a step."""
    tokens = history.series("speed/tokens_per_second")
    time = [] if len(tokens) else [("", history.series("iteration-time"), INK)]
    return draw_panels(
        history,
        [
            ("tokens per second", [("", tokens, BLUE)]),
            ("MFU", [("", history.series("speed/mfu"), GREEN)]),
            ("seconds per step", time),
        ],
        from_zero=("tokens per second", "MFU", "seconds per step"),
    )
