"""Lines, panels and axes of the figures, in one style."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from trinity_megatron.report.history import RunHistory, Series, bin_steps, mean_bins

WIDTH = 10.5  # inches
MAX_COLUMNS = 500  # stretches of steps that a figure shows at most
DPI = 150
# Okabe and Ito's colours, which the common kinds of colour blindness tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, INK, MUTED = "#CC79A7", "#56B4E9", "#1f2430", "#6b7280"
COLORS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, INK, MUTED)
FEW_LAYERS = 4  # up to this many, each layer has a panel of the full width
MOST_INSIDE = 5  # lines that a legend inside the axes has room for
# Of the axis' labels with their ticks, and of a legend below, in inches.
_LEFT, _BELOW, _LEGEND_HEIGHT = 0.72, 0.52, 0.42
_TITLE_HEIGHT = 0.27  # of a layer's panel, in inches


@dataclass(frozen=True)
class Line:
    """A scalar in a panel.

    Attributes:
        label: Name in the legend; empty for none.
        series: Its values.
        color: Colour of the line.
    """

    label: str
    series: Series
    color: str


@dataclass(frozen=True)
class Panel:
    """A line chart of :func:`draw_panels`.

    Attributes:
        title: Stands above it.
        lines: Those without a finite value are left out.
        y_axis: Automatic, starting at zero, or logarithmic.
    """

    title: str
    lines: Sequence[Line]
    y_axis: Literal["automatic", "from zero", "logarithmic"] = "automatic"


def draw_panels(
    history: RunHistory, panels: Sequence[Panel], *, against_tokens: bool = False
) -> Figure | None:
    """Draw line charts side by side; those without values are left out.

    Args:
        history: The run, for the axis of tokens.
        panels: In reading order.
        against_tokens: Whether the horizontal axis shows tokens (steps if they are not recorded).

    Returns:
        The figure; None if no panel has a value.
    """
    shown = [panel for panel in map(_drop_empty_lines, panels) if panel.lines]
    if not shown:
        return None
    num_columns = 3 if len(shown) == 3 else min(2, len(shown))
    num_rows = -(-len(shown) // num_columns)
    below = _LEGEND_HEIGHT if any(len(panel.lines) > MOST_INSIDE for panel in shown) else 0.0
    figure, axes = axes_in_grid(num_rows, num_columns, height=2.9, title=0.3, below=below)
    for axis, panel in zip(axes, shown, strict=False):
        x = tokens_or_steps(history) if against_tokens else None
        for line in panel.lines:
            plot_series(axis, line.series, line.color, line.label, x=x)
        axis.set_title(panel.title, loc="left", fontsize=10, color=INK)
        if panel.y_axis == "logarithmic":
            use_log_axis(axis)
        else:
            _use_linear_axis(axis, from_zero=panel.y_axis == "from zero")
        if against_tokens:
            label_tokens(axis, history)
        else:
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(_step_locator(6 if num_columns < 3 else 4))
        _add_panel_legend(figure, axis, panel)
    for axis in axes[len(shown) :]:
        axis.remove()
    return finish(figure)


def axes_in_grid(
    num_rows: int, num_columns: int, *, height: float, title: float = 0.0, below: float = 0.0
) -> tuple[Figure, np.ndarray]:
    """A figure with axes in rows and columns; the margins hold tick labels and axis labels.

    They are computed here: constrained layout measures every text, twice as long as the drawing.

    Args:
        num_rows: Rows.
        num_columns: Columns.
        height: Of a row with all that belongs to it, in inches.
        title: Height of the titles above the axes, in inches.
        below: Additional height below the axes of each row, in inches.

    Returns:
        The figure, and its axes in reading order.
    """
    total = num_rows * height + 0.15
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    around = title + _BELOW + below  # of an axes, within its row
    wide = (WIDTH - 0.2) / num_columns - _LEFT
    figure.subplots_adjust(
        left=_LEFT / WIDTH,
        right=1 - 0.2 / WIDTH,
        top=1 - (0.15 + title) / total,
        bottom=(_BELOW + below) / total,
        hspace=around / (height - around),
        wspace=_LEFT / wide,
    )
    return figure, axes.ravel()


def _drop_empty_lines(panel: Panel) -> Panel:
    return replace(panel, lines=[line for line in panel.lines if len(line.series.finite)])


def _add_panel_legend(figure: Figure, axis: Axes, panel: Panel) -> None:
    if len(panel.lines) > MOST_INSIDE:  # inside the axes it would cover the lines
        height = axis.get_window_extent().height / figure.dpi
        axis.legend(
            frameon=False,
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -(_BELOW - 0.1) / height),
            ncols=4,
        )
    elif any(line.label for line in panel.lines):
        axis.legend(frameon=False, fontsize=8)


def plot_series(
    axis: Axes,
    series: Series,
    color: str,
    label: str,
    *,
    x: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Plot a scalar; of many steps the mean of each stretch and, pale, the range within it.

    Args:
        axis: Where to plot.
        series: The scalar; must have a finite value.
        color: Colour of the line.
        label: Name in the legend; empty for none.
        x: Position of steps on the horizontal axis; the steps if None.
    """
    series = series.finite
    edges, bins = bin_steps(series.steps, 200)
    num_bins = len(edges) - 1
    steps = mean_bins(series.steps.astype(float), bins, num_bins)
    position = steps if x is None else x(steps)
    if len(series) > 1.5 * num_bins:
        low, high = np.full(num_bins, np.inf), np.full(num_bins, -np.inf)
        np.minimum.at(low, bins, series.values)
        np.maximum.at(high, bins, series.values)
        axis.fill_between(position, low, high, color=color, alpha=0.2, linewidth=0)
    mean = mean_bins(series.values, bins, num_bins)
    seen = np.isfinite(mean)
    marker = "o" if seen.sum() == 1 else None
    axis.plot(
        position[seen], mean[seen], color=color, linewidth=1.3, label=label or None, marker=marker
    )


def plot_layers(axis: Axes, x: np.ndarray, values: np.ndarray, names: Sequence[str]) -> None:
    """Plot a line a layer; of many layers only the highest at the end have a colour.

    Args:
        axis: Where to plot.
        x: Steps, ``[n]``.
        values: ``[n, num_layers]``.
        names: ``[num_layers]``.
    """
    if len(names) <= 6:
        for column, (name, color) in enumerate(zip(names, COLORS, strict=False)):
            axis.plot(x, values[:, column], color=color, linewidth=1.2, label=name)
        return
    axis.plot(x, values, color=MUTED, alpha=0.35, linewidth=0.6)
    axis.plot([], [], color=MUTED, alpha=0.6, linewidth=0.8, label=f"each of {len(names)} layers")
    axis.plot(x, np.median(values, axis=1), color=INK, linewidth=2, label="median layer")
    last = max(1, len(x) // 10)
    order = np.argsort(np.nan_to_num(values[-last:]).mean(axis=0))[::-1]
    for column, color in zip(order[:3], (RED, BLUE, GREEN), strict=True):
        axis.plot(x, values[:, column], color=color, linewidth=1.2, label=names[column])


def plot_bands(axis: Axes, x: np.ndarray, values: np.ndarray) -> None:
    """Plot range, middle four fifths and median of the experts.

    Args:
        axis: Where to plot.
        x: Steps, ``[n]``.
        values: ``[n, num_experts]``.
    """
    low, tenth, median, ninetieth, high = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], axis=1)
    axis.fill_between(x, low, high, color=SKY, alpha=0.45, linewidth=0, label="lowest to highest")
    axis.fill_between(x, tenth, ninetieth, color=BLUE, alpha=0.6, linewidth=0, label="10% to 90%")
    axis.plot(x, median, color=INK, linewidth=1, label="median")


def layer_panels(
    history: RunHistory,
    columns: int,
    *,
    height: float,
    legend: float = 0.9,
    left: float = 0.055,
    num_layers: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """A panel for each layer with its name above, in reading order.

    The margins are computed here, because constrained layout is slow with many panels.

    Args:
        history: The run.
        columns: Panels in a row.
        height: Of a panel, in inches.
        legend: Height below the panels, in inches.
        left: Left margin over the width of the figure.
        num_layers: Panels, if not as many as the layers that have token counts.
    """
    num_layers = num_layers or history.num_layers
    titles = history.layer_names
    if len(titles) != num_layers:
        titles = [f"MoE layer {index + 1}" for index in range(num_layers)]
    num_rows = -(-num_layers // columns)
    total = num_rows * (height + _TITLE_HEIGHT) + legend + 0.15
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.subplots(num_rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=left,
        right=0.98,
        top=1 - 0.25 / total,
        bottom=legend / total,
        hspace=_TITLE_HEIGHT / height,
        wspace=0.06 if columns < 6 else 0.1,
    )
    flat = list(axes.ravel())
    for index, axis in enumerate(flat[:num_layers]):
        axis.set_title(titles[index], loc="left", fontsize=8.5, color=INK, pad=2)
        axis.xaxis.set_major_locator(_step_locator(6 if columns == 1 else 3))
        is_lowest = index + columns >= num_layers
        is_left = index % columns == 0
        axis.tick_params(labelsize=8, labelbottom=is_lowest, labelleft=is_left)
        if is_lowest:
            axis.set_xlabel("step", fontsize=8.5)
    for axis in flat[num_layers:]:
        axis.remove()
    return figure, flat[:num_layers]


def _step_locator(most: int) -> MaxNLocator:
    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


def tokens_or_steps(history: RunHistory) -> Callable[[np.ndarray], np.ndarray]:
    """A function from steps to positions: tokens seen, or the steps if tokens are not recorded."""

    def to_position(steps: np.ndarray) -> np.ndarray:
        tokens = history.tokens_at(steps)
        return steps if tokens is None else tokens

    return to_position


def label_tokens(axis: Axes, history: RunHistory) -> None:
    """Label the horizontal axis whose positions :func:`tokens_or_steps` gives."""
    if history.tokens_at(np.zeros(1)) is None:
        axis.set_xlabel("step")
        return
    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def short_number(value: float) -> str:
    """A count in the fewest characters: 2.5B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _use_linear_axis(axis: Axes, *, from_zero: bool) -> None:
    """Linear, with numbers without exponents; lines of zeros only stay above the lower edge."""
    if from_zero:
        axis.set_ylim(bottom=0)
    if all(not np.any(line.get_ydata()) for line in axis.lines):
        axis.set_ylim(-0.05, 1)
    if axis.get_ylim()[1] >= 1e4:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def use_log_axis(axis: Axes) -> None:
    """Logarithmic with plain numbers; also between the powers of ten if there are few of them."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    marks = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=marks, numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def put_legend_outside(axis: Axes) -> None:
    """Put the legend to the right of the lines."""
    axis.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def finish(figure: Figure) -> Figure:
    """Give all axes of a figure the same frame and grid; return the figure."""
    for axis in figure.axes:
        axis.spines[:].set_color("#9aa1ad")
        if not axis.get_images():
            axis.margins(x=0.01)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e5e7eb", linewidth=0.6)
            axis.set_axisbelow(True)
    return figure
