"""The HTML of the report: text, tables and embedded pictures; no script, nothing from elsewhere."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from itertools import groupby
from math import isfinite, isnan
from pathlib import Path

import numpy as np

from trinity_megatron import __version__
from trinity_megatron.report.balance_verdict import Verdict, rules
from trinity_megatron.report.history import RunHistory, Series


@dataclass(frozen=True)
class DrawnPicture:
    """A picture as it goes into the page.

    Attributes:
        chapter: Heading under which it stands.
        title: Its own heading.
        caption: How to read it.
        path: PNG file; None if the run has not recorded what it shows.
        tags: What it shows.
    """

    chapter: str
    title: str
    caption: str
    path: Path | None
    tags: tuple[str, ...]


# Row of the table of key figures: words, tag, which value is best, format.
_KEY_FIGURES = (
    ("Training loss (nats per token)", "lm loss", min, ".4f"),
    ("Validation loss (nats per token)", "lm loss validation", min, ".4f"),
    ("MaxVio, mean of the layers", "moe/mean_max_violation", min, ".3f"),
    ("MaxVio, highest layer", "moe/max_violation", min, ".3f"),
    ("Experts without a token in 100 steps", "moe/dead_experts_window", min, ".0f"),
    ("Entropy of the load (1 = balanced)", "moe/load_entropy", max, ".4f"),
    ("Largest bias (absolute)", "moe/bias_max_abs", None, ".3f"),
    ("Highest router logit", "router/max_logit", None, ".2f"),
    ("Highest LM-head logit", "lm_head/max_logit", None, ".2f"),
    ("Gradient norm", "grad-norm", None, ".3g"),
    ("BatchHet (nats per token)", "data/batch_het", min, ".3f"),
    ("Tokens per second", "speed/tokens_per_second", max, ",.0f"),
    ("MFU", "speed/mfu", max, ".1%"),
)

_GLOSSARY = (
    (
        "Load, share",
        "The tokens that an expert gets in a step, over the global batch. Its share is the mean of "
        "its layer: tokens times K / N, for K of N experts per token.",
    ),
    (
        "MaxVio",
        "Maximal violation of balance in a layer and step: (max - mean) / mean of the load. 0 is "
        "perfect balance; N / K - 1 is one expert chosen by every token.",
    ),
    (
        "Chance alone",
        "MaxVio of a router that chooses experts by lot: the busiest of many experts is above the "
        "mean by luck, and the more so the fewer tokens an expert gets.",
    ),
    ("Idle expert", "Got less than 1% of its share over the whole last window."),
    ("Dead expert", "Got no token at all in the last 100 steps."),
    (
        "Entropy of the load",
        "Entropy of the shares of a layer's experts divided by log N: 1 is balance, 0 is one "
        "expert for all.",
    ),
    (
        "Expert bias",
        "Added to the router's scores only to choose the experts, not to weigh them. SMEBU (or the "
        "sign rule) raises it for experts below their share and lowers it for those above.",
    ),
    (
        "BatchHet",
        "Heterogeneity of a batch: highest minus mean loss of the micro-batches of a step.",
    ),
    (
        "Sequence-wise balance loss",
        "Sum over the experts of their share of the choices times their share of the scores within "
        "a sequence, times N: 1 when balanced.",
    ),
    (
        "Logsumexp, z-loss",
        "Logarithm of the softmax's denominator of the LM head; the z-loss is its mean square "
        "times a small coefficient and keeps it from drifting.",
    ),
    (
        "MFU",
        "Model FLOPs utilisation: arithmetic of the model per second over the peak of the devices.",
    ),
)

_STYLE = """
:root { color-scheme: light; --ink: #1f2430; --muted: #596273; --line: #d8dce3; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 32px 64px; background: #fff;
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 30px; margin: 0; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 22px; margin: 44px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 17px; margin: 26px 0 6px; }
p { margin: 6px 0; }
.facts, .absent, footer { color: var(--muted); }
.facts { margin: 4px 0 20px; }
.verdict { border: 1px solid var(--line); border-left: 10px solid var(--state);
  border-radius: 6px; padding: 14px 20px; margin: 16px 0; }
.verdict strong { display: block; font-size: 22px; color: var(--state); }
.balanced { --state: #00795a; } .settling { --state: #0067a0; } .unbalanced { --state: #a85f00; }
.drifting { --state: #b44e00; } .collapsing { --state: #a30f2d; } .none { --state: #596273; }
nav { margin: 14px 0; } nav a { margin-right: 18px; }
a { color: #005a96; }
figure { margin: 0 0 10px; break-inside: avoid; page-break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: 14.5px; max-width: 92ch; }
table { border-collapse: collapse; margin: 12px 0; font-size: 15px; width: 100%; }
.wide { overflow-x: auto; }
th, td { text-align: right; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; }
tbody th { border-bottom-width: 1px; }
th:first-child { text-align: left; font-weight: 400; }
thead th { white-space: normal; }
thead th:first-child { font-weight: 600; }
td small { color: var(--muted); }
td.state { color: var(--state); font-weight: 600; }
dt { font-weight: 600; margin-top: 10px; } dd { margin: 0 0 0 20px; max-width: 92ch; }
li { margin: 6px 0; max-width: 96ch; }
code { font-size: 0.92em; overflow-wrap: anywhere; }
footer { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 10px; font-size: 14px; }
@media print {
  @page { size: A4; margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  h1 { font-size: 20pt; } h2 { font-size: 15pt; } h3 { font-size: 12pt; }
  h2, h3 { break-after: avoid; page-break-after: avoid; }
  figure img { max-height: 215mm; object-fit: contain; object-position: left top; }
  figcaption, table { font-size: 9pt; }
  th, td { padding: 2px 8px 2px 0; }
  tr, dt, dd, li, .verdict { break-inside: avoid; page-break-inside: avoid; }
  thead { display: table-header-group; }
  .verdict { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def render_page(
    title: str,
    history: RunHistory,
    verdict: Verdict | None,
    pictures: Sequence[DrawnPicture],
    period: tuple[datetime, datetime] | None,
) -> str:
    """The whole page.

    Args:
        title: Name of the run.
        history: The run.
        verdict: On the balance of its experts; None without token counts.
        pictures: In the order of the page, those without a file included.
        period: When the run began and ended.
    """
    chapters = [(name, list(group)) for name, group in groupby(pictures, lambda p: p.chapter)]
    headings = [name for name, _ in chapters] + ["Layers", "How the verdict is reached", "Glossary"]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="facts">{_facts(history, period)}</p>',
        _verdict_box(verdict),
        *_warnings(history),
        _navigation(headings),
        _key_figures(history),
    ]
    for name, group in chapters:
        parts.append(_heading(name))
        parts.extend(_figure(picture, history) for picture in group)
    parts += [
        _heading("Layers"),
        _layer_table(verdict),
        _heading("How the verdict is reached"),
        _rules(history),
        _heading("Glossary"),
        _glossary(),
        f"<footer>Made by trinity_megatron {__version__} from the TensorBoard files of the run. "
        "The page needs no network.</footer>",
    ]
    body = "\n".join(parts)
    # The policy forbids the browser every request and every script, whatever a title contains.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _facts(history: RunHistory, period: tuple[datetime, datetime] | None) -> str:
    facts = []
    steps = history.series("lm loss").steps
    steps = steps if len(steps) else history.steps
    if len(steps):
        planned = history.argument("train_iters")
        of = f" of {planned}" if planned and planned.isdigit() else ""
        facts.append(f"step {steps[-1]}{of}")
        tokens = history.tokens_at(steps[-1:])
        if tokens is not None:
            facts.append(f"{_short(float(tokens[0]))} tokens")
    else:
        facts.append("nothing is recorded yet")
    if history.has_experts:
        experts = f"{history.num_layers} MoE layers of {history.num_experts} experts"
        facts.append(experts + (f", {history.topk} per token" if history.topk else ""))
    if period is not None:
        first, last = period
        end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
        facts.append(f"{first:%Y-%m-%d %H:%M} to {end} UTC")
    return escape(" · ".join(facts))


def _verdict_box(verdict: Verdict | None) -> str:
    if verdict is None:
        return (
            '<section class="verdict none"><strong>No verdict</strong>The run has no token '
            "counts: it has no MoE layer, or was not logged by trinity_megatron.</section>"
        )
    style = verdict.state if verdict.state != "too short" else "none"
    return (
        f'<section class="verdict {style}"><strong>{escape(verdict.state.capitalize())}</strong>'
        f"{escape(verdict.text)}</section>"
    )


def _warnings(history: RunHistory) -> Iterator[str]:
    for name, tag in (("loss", "lm loss"), ("gradient norm", "grad-norm")):
        series = history.series(tag)
        bad = series.steps[~np.isfinite(series.values)]
        if len(bad):
            yield (
                f"<p><b>The {name} was not finite</b> in {len(bad)} of {len(series)} logged steps, "
                f"first at step {bad[0]}.</p>"
            )


def _navigation(headings: Sequence[str]) -> str:
    links = (f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in headings)
    return f"<nav>{' '.join(links)}</nav>"


def _heading(name: str) -> str:
    return f'<h2 id="{_anchor(name)}">{escape(name)}</h2>'


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _key_figures(history: RunHistory) -> str:
    rows = []
    for words, tag, best, form in _KEY_FIGURES:
        series = history.series(tag).finite
        if not len(series):
            continue
        values = series.values
        place = (
            None if best is None else int(np.argmin(values) if best is min else np.argmax(values))
        )
        cells = [escape(words), format(values[0], form)]
        cells.append("" if place is None else _at(series, place, form))
        cells.append(format(values[-1], form))
        rows.append(cells)
    if not rows:
        return ""
    return _table(("Key figures", "first", "best", "last"), rows)


def _at(series: Series, place: int, form: str) -> str:
    return f"{series.values[place]:{form}} <small>step {series.steps[place]}</small>"


def _figure(picture: DrawnPicture, history: RunHistory) -> str:
    missing = [tag for tag in picture.tags if not history.recorded(tag)]
    names = ", ".join(f"<code>{escape(tag)}</code>" for tag in missing)
    title = f"<h3>{escape(picture.title)}</h3>"
    if picture.path is None:
        return f'{title}\n<p class="absent">Left out: the run has not recorded {names}.</p>'
    image = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    absent = f' <span class="absent">Not recorded: {names}.</span>' if missing else ""
    return (
        f'<figure>{title}\n<img alt="{escape(_alt(picture, history))}" '
        f'src="data:image/png;base64,{image}">\n'
        f"<figcaption>{escape(picture.caption)}{absent}</figcaption></figure>"
    )


def _alt(picture: DrawnPicture, history: RunHistory) -> str:
    """A description with numbers, for those who do not see the picture."""
    text = f"{picture.title} of the run."
    for tag in picture.tags:
        series = history.series(tag).finite
        if len(series):
            text += (
                f" {tag}: {series.values[0]:.4g} at step {series.steps[0]}, "
                f"{series.values[-1]:.4g} at step {series.steps[-1]}."
            )
    return text


def _layer_table(verdict: Verdict | None) -> str:
    if verdict is None or not verdict.layers:
        return '<p class="absent">Left out: there is no verdict on single layers.</p>'
    rows = []
    for layer in verdict.layers:
        bias = "" if isnan(layer.bias_range) else f"{layer.bias_range:.3f}"
        rows.append(
            [
                escape(layer.name),
                layer.state,
                f"{layer.violation:.2f}",
                f"{layer.best:.2f}",
                f"{layer.noise:.2f}",
                f"{layer.busiest} <small>({layer.busiest_load:.2f})</small>",
                str(layer.idle),
                bias,
            ]
        )
    heads = (
        "Layer",
        "state",
        "MaxVio",
        "best before",
        "by chance",
        "busiest expert (load)",
        "idle experts",
        "range of the bias",
    )
    note = (
        f"<p>Steps {verdict.first_step} to {verdict.last_step}: the last {verdict.num_steps} "
        "logged steps. Loads are relative to the mean of the layer; experts are counted from 0.</p>"
    )
    return note + _table(heads, rows, state_column=1)


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, state_column: int | None = None
) -> str:
    """Cells are HTML."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = []
    for row in rows:
        cells = f'<th scope="row">{row[0]}</th>'
        for column, text in enumerate(row[1:], start=1):
            style = f' class="state {text}"' if column == state_column else ""
            cells += f"<td{style}>{text}</td>"
        body.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(body)
        + "</tbody></table></div>"
    )


def _rules(history: RunHistory) -> str:
    experts = history.num_experts if history.has_experts else None
    items = (f"<li>{escape(rule)}</li>" for rule in rules(experts, history.topk))
    return f"<ul>{''.join(items)}</ul>"


def _glossary() -> str:
    items = (f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in _GLOSSARY)
    return f"<dl>{''.join(items)}</dl>"


def _short(number: float) -> str:
    """A number with its unit: 3.2 million."""
    for size, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if isfinite(number) and number >= size:
            return f"{number / size:.3g}{word}"
    return f"{number:,.0f}"
