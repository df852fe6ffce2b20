"""What the pictures are made of: lines, heat maps, panels and axes in one style."""

from collections.abc import Callable, Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from trinity_megatron.report.history import RunHistory, Series, bin_steps, mean_bins

WIDTH = 10.5  # inches
MAX_COLUMNS = 500
DPI = 150
# Okabe and Ito's colours, which the common kinds of colour blindness tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, INK, MUTED = "#CC79A7", "#56B4E9", "#1f2430", "#6b7280"
COLORS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, INK, MUTED)
_NO_DATA = "#d9d9d9"
LOAD_LEVELS = np.array([0.01, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0])
VIOLATION_LEVELS = np.array([0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 50])
FEW_LAYERS = 4
NUM_ROWS, _ENDS = 64, 4  # of a strip; busiest and least busy experts with rows of their own

Line = tuple[str, Series, str]


def draw_panels(
    history: RunHistory,
    panels: Sequence[tuple[str, Sequence[Line]]],
    *,
    against_tokens: bool = False,
    from_zero: tuple[str, ...] = (),
    log: tuple[str, ...] = (),
) -> Figure | None:
    """Line charts side by side, two in a row; those without values are left out."""
    shown = []
    for title, lines in panels:
        kept = [line for line in lines if len(line[1].finite)]
        if kept:
            shown.append((title, kept))
    if not shown:
        return None
    columns = 3 if len(shown) == 3 else min(2, len(shown))
    num_rows = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.9 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, shown, strict=False):
        x = tokens_or_steps(history) if against_tokens else None
        for name, series, color in lines:
            plot_series(axis, series, color, name, x=x)
        axis.set_title(title, loc="left", fontsize=10, color=INK)
        if title in log:
            use_log_axis(axis)
        else:
            _plain_axis(axis, from_zero=title in from_zero)
        if against_tokens:
            label_tokens(axis, history)
        else:
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(_step_locator(6 if columns < 3 else 4))
        if len(lines) > 5:  # inside it would hide them
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 4}
            axis.legend(frameon=False, fontsize=8, **below)
        elif any(name for name, _, _ in lines):
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(shown) :]:
        axis.remove()
    return finish(figure)


def plot_series(
    axis: Axes,
    series: Series,
    color: str,
    label: str,
    *,
    x: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """A line; of many steps the mean of each stretch and, pale, the range within it."""
    series = series.finite
    edges, bins = bin_steps(series.steps, 200)
    num_bins = len(edges) - 1
    steps = mean_bins(series.steps.astype(float), bins, num_bins)
    place = steps if x is None else x(steps)
    if len(series) > 1.5 * num_bins:
        low, high = np.full(num_bins, np.inf), np.full(num_bins, -np.inf)
        np.minimum.at(low, bins, series.values)
        np.maximum.at(high, bins, series.values)
        axis.fill_between(place, low, high, color=color, alpha=0.2, linewidth=0)
    mean = mean_bins(series.values, bins, num_bins)
    seen = np.isfinite(mean)
    marker = "o" if seen.sum() == 1 else None
    axis.plot(
        place[seen], mean[seen], color=color, linewidth=1.3, label=label or None, marker=marker
    )


def plot_layers(axis: Axes, x: np.ndarray, values: np.ndarray, names: Sequence[str]) -> None:
    """A line a layer; of many layers only the highest at the end have a colour."""
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
    """Range, middle four fifths and median of ``[n, experts]``."""
    low, tenth, median, ninetieth, high = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], axis=1)
    axis.fill_between(x, low, high, color=SKY, alpha=0.45, linewidth=0, label="lowest to highest")
    axis.fill_between(x, tenth, ninetieth, color=BLUE, alpha=0.6, linewidth=0, label="10% to 90%")
    axis.plot(x, median, color=INK, linewidth=1, label="median")


def pool_experts(loads: np.ndarray) -> np.ndarray:
    """Rows of a strip, ``[columns, experts]`` -> ``[columns, rows]``, the first row lowest.

    Up to 64 experts keep their row.  More are sorted by their load at the end: the busiest and the
    least busy ones get four rows each, so that one expert in hundreds is seen, and the others share
    rows with their neighbours in this order.
    """
    num_experts = loads.shape[1]
    if num_experts <= NUM_ROWS:
        return loads
    last = max(1, len(loads) // 10)
    order = np.argsort(np.nan_to_num(loads[-last:]).mean(axis=0), kind="stable")
    low, middle, high = order[:_ENDS], order[_ENDS:-_ENDS], order[-_ENDS:]
    shared = [loads[:, group].mean(axis=1) for group in np.array_split(middle, NUM_ROWS // 2)]
    own = [np.repeat(loads[:, part], NUM_ROWS // 4 // _ENDS, axis=1) for part in (low, high)]
    return np.concatenate([own[0], np.stack(shared, axis=1), own[1]], axis=1)


def draw_heat_map(
    axis: Axes,
    rows: np.ndarray,
    edges: np.ndarray,
    cmap: str,
    levels: np.ndarray,
    *,
    extend: Literal["max", "both"],
) -> AxesImage:
    """``[rows, columns]`` in steps of colour, row 0 at the bottom."""
    colors = matplotlib.colormaps[cmap].with_extremes(bad=_NO_DATA)
    norm = BoundaryNorm(levels, colors.N, extend=extend)
    return axis.imshow(
        np.ma.masked_invalid(rows),
        cmap=colors,
        norm=norm,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(edges[0], edges[-1], -0.5, len(rows) - 0.5),
    )


def layer_panels(
    history: RunHistory,
    columns: int,
    *,
    height: float,
    legend: float = 0.9,
    left: float = 0.055,
    names: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """A panel for each layer with its name above, in reading order; placed by hand: it is fast."""
    num_layers = names or history.num_layers
    titles = history.layer_names
    if len(titles) != num_layers:
        titles = [f"MoE layer {index + 1}" for index in range(num_layers)]
    num_rows = -(-num_layers // columns)
    row = height + 0.27
    total = num_rows * row + legend + 0.15
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.subplots(num_rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=left,
        right=0.98,
        top=1 - 0.25 / total,
        bottom=legend / total,
        hspace=0.27 / height,
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


def add_colorbar(figure: Figure, image: AxesImage, label: str) -> None:
    """Add the bar of the loads below the panels."""
    height = figure.get_size_inches()[1]
    place = figure.add_axes((0.2, 0.38 / height, 0.6, 0.1 / height))
    bar = figure.colorbar(
        image, cax=place, orientation="horizontal", ticks=LOAD_LEVELS, spacing="uniform"
    )
    bar.ax.set_xticklabels([f"{level:g}" for level in LOAD_LEVELS], fontsize=8)
    bar.set_label(label, fontsize=8.5)


def tokens_or_steps(history: RunHistory) -> Callable[[np.ndarray], np.ndarray]:
    """The place of steps on an axis of tokens, or of steps if tokens are not recorded."""
    if history.tokens_at(np.zeros(1)) is None:
        return lambda steps: steps
    return lambda steps: history.tokens_at(steps)  # type: ignore[return-value]


def label_tokens(axis: Axes, history: RunHistory) -> None:
    """Label the axis on which :func:`tokens_or_steps` places."""
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


def _plain_axis(axis: Axes, *, from_zero: bool) -> None:
    """Plain numbers, and a line that lies at zero is seen to."""
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
    """Give all axes of a figure the same quiet frame."""
    for axis in figure.axes:
        axis.spines[:].set_color("#9aa1ad")
        if not axis.get_images():
            axis.margins(x=0.01)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e5e7eb", linewidth=0.6)
            axis.set_axisbelow(True)
    return figure
