"""The HTML of the report: prepares what ``template.html`` shows.

The page has text, tables and embedded pictures; no script, and nothing that it loads.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from math import isfinite, isnan
from pathlib import Path
from typing import Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trinity_megatron import __version__
from trinity_megatron.report.balance_thresholds import describe_rules
from trinity_megatron.report.balance_verdict import Verdict
from trinity_megatron.report.history import RunHistory
from trinity_megatron.report.scores import ScoreTable
from trinity_megatron.telemetry.tensorboard_log import STRAGGLER_TAG

_MOST_STRAGGLERS = 10  # the latest of them
TEMPLATE_NAME = "template.html"


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that was drawn for the page, or could not be.

    Attributes:
        chapter: Heading under which it stands.
        title: Its own heading.
        caption: How to read it.
        path: PNG file; None if the run has not recorded what it shows.
        tags: The scalars and tensors it shows.
    """

    chapter: str
    title: str
    caption: str
    path: Path | None
    tags: tuple[str, ...]


@dataclass(frozen=True)
class _KeyFigureRow:
    """What a row of the table of key figures shows.

    Attributes:
        name: Words in the first column.
        tag: The scalar.
        best: Which value is best; None if neither is.
        format: Format specification of its values.
    """

    name: str
    tag: str
    best: Literal["lowest", "highest"] | None
    format: str


_KEY_FIGURE_ROWS = (
    _KeyFigureRow("Training loss (nats per token)", "lm loss", "lowest", ".4f"),
    _KeyFigureRow("Validation loss (nats per token)", "lm loss validation", "lowest", ".4f"),
    _KeyFigureRow("MaxVio, mean of the layers", "moe/mean_max_violation", "lowest", ".3f"),
    _KeyFigureRow("MaxVio, highest layer", "moe/max_violation", "lowest", ".3f"),
    _KeyFigureRow(
        "Experts without a token in 100 steps", "moe/dead_experts_window", "lowest", ".0f"
    ),
    _KeyFigureRow("Entropy of the load (1 = balanced)", "moe/load_entropy", "highest", ".4f"),
    _KeyFigureRow("Largest bias (absolute)", "moe/bias_max_abs", None, ".3f"),
    _KeyFigureRow("Highest router logit", "router/max_logit", None, ".2f"),
    _KeyFigureRow("Highest LM-head logit", "lm_head/max_logit", None, ".2f"),
    _KeyFigureRow("Gradient norm", "grad-norm", None, ".3g"),
    _KeyFigureRow("Skipped steps", "train/skipped_steps", None, ".0f"),
    _KeyFigureRow("BatchHet (nats per token)", "data/batch_het", "lowest", ".3f"),
    _KeyFigureRow("Tokens per second", "speed/tokens_per_second", "highest", ",.0f"),
    _KeyFigureRow("MFU", "speed/mfu", "highest", ".1%"),
    _KeyFigureRow(
        "Work of the slowest rank over the others'", "speed/slowest_rank_ratio", "lowest", ".2f"
    ),
)


@dataclass(frozen=True)
class _KeyFigure:
    """A row of the table of key figures; values are formatted."""

    name: str
    first: str
    best: str | None
    best_step: int | None
    last: str


@dataclass(frozen=True)
class _NotFinite:
    """A scalar with values that are not finite."""

    name: str
    num_bad: int
    num_logged: int
    first_step: int


@dataclass(frozen=True)
class _PagePicture:
    """A picture as the template shows it.

    Attributes:
        title: Its heading.
        caption: How to read it.
        image: PNG in base64; None if the picture could not be drawn.
        alt: Description for readers who do not see it.
        missing_tags: What it shows and the run has not recorded.
    """

    title: str
    caption: str
    image: str | None
    alt: str
    missing_tags: tuple[str, ...]


@dataclass(frozen=True)
class _Chapter:
    """Pictures under one heading."""

    name: str
    pictures: tuple[_PagePicture, ...]


def render_page(
    title: str,
    history: RunHistory,
    verdict: Verdict | None,
    pictures: Sequence[DrawnPicture],
    period: tuple[datetime, datetime] | None,
    scores: ScoreTable | None = None,
) -> str:
    """Render the page.

    Args:
        title: Name of the run.
        history: The run.
        verdict: On the balance of its experts; None without token counts.
        pictures: In the order of the page, those without a file included.
        period: When the run began and ended.
        scores: Of benchmarks; None if nothing was evaluated.

    Returns:
        The HTML.
    """
    num_experts = history.num_experts if history.has_experts else None
    return (
        _load_environment()
        .get_template(TEMPLATE_NAME)
        .render(
            title=title,
            version=__version__,
            facts=list(_facts(history, period)),
            verdict=verdict,
            warnings=list(_values_not_finite(history)),
            stragglers=list(history.texts(STRAGGLER_TAG).items())[-_MOST_STRAGGLERS:],
            key_figures=list(_key_figures(history)),
            chapters=list(_chapters(pictures, history)),
            scores=scores,
            rules=describe_rules(num_experts, history.topk),
        )
    )


def _load_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["anchor"] = _anchor
    environment.tests["nan"] = isnan
    return environment


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _facts(history: RunHistory, period: tuple[datetime, datetime] | None) -> Iterator[str]:
    """How far the run is, its experts and when it ran."""
    loss_steps = history.series("lm loss").steps
    steps = loss_steps if len(loss_steps) else history.steps
    if len(steps):
        yield from _progress(history, int(steps[-1]))
    else:
        yield "nothing is recorded yet"
    if history.has_experts:
        experts = f"{history.num_layers} MoE layers of {history.num_experts} experts"
        yield f"{experts}, {history.topk} per token" if history.topk else experts
    if period is not None:
        first, last = period
        same_day = first.date() == last.date()
        end = f"{last:%H:%M}" if same_day else f"{last:%Y-%m-%d %H:%M}"
        yield f"{first:%Y-%m-%d %H:%M} to {end} UTC"


def _progress(history: RunHistory, last_step: int) -> Iterator[str]:
    planned = history.argument("train_iters")
    yield f"step {last_step} of {planned}" if planned and planned.isdigit() else f"step {last_step}"
    tokens = history.tokens_at(np.array([last_step]))
    if tokens is not None:
        yield f"{_format_count(float(tokens[0]))} tokens"


def _format_count(number: float) -> str:
    """A count with its unit: 3.2 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if isfinite(number) and number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def _values_not_finite(history: RunHistory) -> Iterator[_NotFinite]:
    for name, tag in (("loss", "lm loss"), ("gradient norm", "grad-norm")):
        series = history.series(tag)
        bad_steps = series.steps[~np.isfinite(series.values)]
        if len(bad_steps):
            yield _NotFinite(name, len(bad_steps), len(series), int(bad_steps[0]))


def _key_figures(history: RunHistory) -> Iterator[_KeyFigure]:
    for row in _KEY_FIGURE_ROWS:
        series = history.series(row.tag).finite
        if not len(series):
            continue
        best, best_step = None, None
        if row.best is not None:
            find_best = np.argmin if row.best == "lowest" else np.argmax
            index = int(find_best(series.values))
            best, best_step = format(series.values[index], row.format), int(series.steps[index])
        first, last = format(series.values[0], row.format), format(series.values[-1], row.format)
        yield _KeyFigure(row.name, first, best, best_step, last)


def _chapters(pictures: Sequence[DrawnPicture], history: RunHistory) -> Iterator[_Chapter]:
    for name, group in groupby(pictures, lambda picture: picture.chapter):
        yield _Chapter(name, tuple(_prepare_picture(picture, history) for picture in group))


def _prepare_picture(picture: DrawnPicture, history: RunHistory) -> _PagePicture:
    image = None
    if picture.path is not None:
        image = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    return _PagePicture(
        title=picture.title,
        caption=picture.caption,
        image=image,
        alt=_describe_picture(picture, history),
        missing_tags=tuple(tag for tag in picture.tags if not history.recorded(tag)),
    )


def _describe_picture(picture: DrawnPicture, history: RunHistory) -> str:
    """A description with the first and the last value of each scalar."""
    text = f"{picture.title} of the run."
    for tag in picture.tags:
        series = history.series(tag).finite
        if len(series):
            text += (
                f" {tag}: {series.values[0]:.4g} at step {series.steps[0]}, "
                f"{series.values[-1]:.4g} at step {series.steps[-1]}."
            )
    return text
