"""Figures of the loss, the schedule, the logits, the gradients, the data and the speed of a run.

Each function takes the history of a run and returns a figure, or None if the run has not recorded
what the figure shows.  Figures are made without pyplot: no display, no global state in a training
process.
"""

from pathlib import Path

from matplotlib.figure import Figure

from trinity_megatron.errors import UserError
from trinity_megatron.report.charts import (
    BLUE,
    COLORS,
    DPI,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    Line,
    Panel,
    axes_in_grid,
    draw_panels,
    finish,
    label_tokens,
    plot_series,
    tokens_or_steps,
)
from trinity_megatron.report.history import RunHistory
from trinity_megatron.telemetry.step_statistics import GRADIENT_GROUPS
from trinity_megatron.telemetry.tensorboard_log import RunLog


def draw_loss(log: RunLog, path: Path, *, unigram_entropy: float | None = None) -> None:
    """Draw training and validation loss over the tokens, or over the steps.

    Args:
        log: The run.
        path: PNG to write.
        unigram_entropy: Entropy in nats per token to draw as a line.

    Raises:
        UserError: The run has no loss.
    """
    figure = loss_figure(RunHistory(log), unigram_entropy=unigram_entropy)
    if figure is None:
        raise UserError("The run has no 'lm loss': it has not finished a step.")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if engine := figure.get_layout_engine():  # savefig would draw all of it to lay it out
        figure.set_dpi(DPI)
        engine.execute(figure)
        figure.set_layout_engine("none")
    figure.savefig(path, dpi=DPI)


def loss_figure(history: RunHistory, *, unigram_entropy: float | None = None) -> Figure | None:
    """Training and validation loss over the tokens, or over the steps.

    Args:
        history: The run.
        unigram_entropy: Entropy in nats per token to draw as a line.
    """
    train = history.series("lm loss")
    valid = history.series("lm loss validation").finite
    if not len(train.finite):
        return None
    figure, (axis,) = axes_in_grid(1, 1, height=4.45)
    to_position = tokens_or_steps(history)
    plot_series(axis, train, BLUE, "training", x=to_position)
    if len(valid):
        axis.plot(
            to_position(valid.steps),
            valid.values,
            "o-",
            color=RED,
            label="validation",
            markersize=4,
        )
    if unigram_entropy is not None:
        axis.axhline(unigram_entropy, color=MUTED, linestyle="--", label="unigram entropy")
    label_tokens(axis, history)
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False)
    return finish(figure)


def schedule_figure(history: RunHistory) -> Figure | None:
    """Learning rates and batch size over the tokens, or over the steps."""
    rates = [
        Line("Muon", history.series("lr/muon"), BLUE),
        Line("AdamW", history.series("lr/adamw"), ORANGE),
    ]
    if not any(len(line.series) for line in rates):
        rates = [Line("learning rate", history.series("learning-rate"), BLUE)]
    batch_size = [Line("", history.series("batch-size"), INK)]
    panels = [
        Panel("learning rate", rates, "from zero"),
        Panel("batch size (sequences)", batch_size, "from zero"),
    ]
    return draw_panels(history, panels, against_tokens=True)


def logits_figure(history: RunHistory) -> Figure | None:
    """Logits of the routers, of the LM head and of attention over the steps."""
    router = [
        Line("highest", history.series("router/max_logit"), RED),
        Line("mean", history.series("router/mean_logit"), BLUE),
        Line("standard deviation", history.series("router/logit_std"), GREEN),
    ]
    head = [
        Line("highest", history.series("lm_head/max_logit"), RED),
        Line("mean logsumexp", history.series("lm_head/mean_logsumexp"), ORANGE),
        Line("mean", history.series("lm_head/mean_logit"), BLUE),
    ]
    z_loss = [Line("", history.series("lm_head/z_loss"), PURPLE)]
    attention = [Line("", history.series("attention/max_logit_bound"), INK)]
    panels = [
        Panel("router logits", router),
        Panel("LM-head logits", head),
        Panel("LM-head z-loss", z_loss),
        Panel("bound of the attention logits", attention),
    ]
    return draw_panels(history, panels)


def gradient_norm_figure(history: RunHistory) -> Figure | None:
    """Gradient norm in total and by group of parameters over the steps."""
    total = [Line("", history.series("grad-norm"), INK)]
    groups = [
        Line(group.replace("_", " "), history.series(f"grad_norm/{group}"), color)
        for group, color in zip(GRADIENT_GROUPS, COLORS, strict=True)
    ]
    panels = [
        Panel("gradient norm, all", total, "logarithmic"),
        Panel("gradient norm by group", groups, "logarithmic"),
    ]
    return draw_panels(history, panels)


def data_figure(history: RunHistory) -> Figure | None:
    """Heterogeneity of the batches and the sequence-wise balance loss over the steps."""
    batch_het = [Line("", history.series("data/batch_het"), BLUE)]
    balance_loss = [Line("", history.series("seq_load_balancing_loss"), GREEN)]
    panels = [
        Panel("BatchHet (nats per token)", batch_het),
        Panel("sequence-wise balance loss", balance_loss),
    ]
    return draw_panels(history, panels)


def throughput_figure(history: RunHistory) -> Figure | None:
    """Tokens per second, MFU and the slowest rank over the steps; the time of untimed steps."""
    tokens = history.series("speed/tokens_per_second")
    mfu = [Line("", history.series("speed/mfu"), GREEN)]
    slowest = history.series("speed/slowest_rank_ratio")
    seconds = [] if len(tokens) else [Line("", history.series("iteration-time"), INK)]
    panels = [
        Panel("tokens per second", [Line("", tokens, BLUE)], "from zero"),
        Panel("MFU", mfu, "from zero"),
        Panel("seconds per step", seconds, "from zero"),
        Panel("work of the slowest rank", [Line("", slowest, ORANGE)]),
    ]
    return draw_panels(history, panels)
