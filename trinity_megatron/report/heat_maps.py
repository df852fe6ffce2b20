"""Heat maps of the figures: steps to the right, one row an expert or a layer."""

from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

_NO_DATA = "#d9d9d9"
LOAD_LEVELS = np.array([0.01, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0])
VIOLATION_LEVELS = np.array([0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 50])
NUM_ROWS = 64  # rows of a layer's strip at most
# In a layer with more experts than rows, experts at each end of the order that share no row.
_NUM_EXTREME_EXPERTS = 4
_EXTREME_ROWS_PER_EXPERT = NUM_ROWS // 4 // _NUM_EXTREME_EXPERTS


def pool_experts(loads: np.ndarray) -> np.ndarray:
    """Reduce the experts of a layer to at most 64 rows.

    Up to 64 experts keep their row.  More are sorted by their load at the end: each of the four
    busiest and the four least busy ones gets four rows, so that one expert in hundreds is seen, and
    the others share rows with their neighbours in this order.

    Args:
        loads: Loads relative to their mean, ``[num_columns, num_experts]``.

    Returns:
        ``[num_columns, num_rows]``, the first row lowest.
    """
    num_experts = loads.shape[1]
    if num_experts <= NUM_ROWS:
        return loads
    last = max(1, len(loads) // 10)
    order = np.argsort(np.nan_to_num(loads[-last:]).mean(axis=0), kind="stable")
    least_busy = order[:_NUM_EXTREME_EXPERTS]
    between = order[_NUM_EXTREME_EXPERTS:-_NUM_EXTREME_EXPERTS]
    busiest = order[-_NUM_EXTREME_EXPERTS:]
    lower_rows = np.repeat(loads[:, least_busy], _EXTREME_ROWS_PER_EXPERT, axis=1)
    upper_rows = np.repeat(loads[:, busiest], _EXTREME_ROWS_PER_EXPERT, axis=1)
    groups = np.array_split(between, NUM_ROWS // 2)
    shared_rows = np.stack([loads[:, group].mean(axis=1) for group in groups], axis=1)
    return np.concatenate([lower_rows, shared_rows, upper_rows], axis=1)


def draw_heat_map(
    axis: Axes,
    rows: np.ndarray,
    edges: np.ndarray,
    cmap: str,
    levels: np.ndarray,
    *,
    extend: Literal["max", "both"],
) -> AxesImage:
    """Draw values in steps of colour.

    Args:
        axis: Where to draw.
        rows: ``[num_rows, num_columns]``, row 0 at the bottom; what is not finite is grey.
        edges: Steps between the columns, ``[num_columns + 1]``.
        cmap: Matplotlib's name of the colours.
        levels: Values between the colours.
        extend: Whether values above, or also below, the levels have colours of their own.
    """
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


def add_colorbar(figure: Figure, image: AxesImage, label: str) -> None:
    """Add the colour bar of the loads below the panels."""
    height = figure.get_size_inches()[1]
    place = figure.add_axes((0.2, 0.38 / height, 0.6, 0.1 / height))
    bar = figure.colorbar(
        image, cax=place, orientation="horizontal", ticks=LOAD_LEVELS, spacing="uniform"
    )
    bar.ax.set_xticklabels([f"{level:g}" for level in LOAD_LEVELS], fontsize=8)
    bar.set_label(label, fontsize=8.5)
