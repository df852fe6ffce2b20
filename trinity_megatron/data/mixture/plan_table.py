"""The plan of a mixture as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trinity_megatron.data.mixture.plan import Plan, describe_epochs
from trinity_megatron.data.mixture.quantities import format_tokens


def format_plan(plan: Plan) -> str:
    """The plan as tables: tokens by corpus and phase, by language and phase."""
    ends = _ends(plan)
    head = ["corpus", "language", *ends, "total", "share", "has", "epochs"]
    rows = [
        [
            item.name,
            item.language or "-",
            *(format_tokens(tokens) for tokens in item.by_phase),
            format_tokens(item.tokens),
            f"{item.tokens / plan.tokens:.1%}",
            "-" if item.held is None else format_tokens(item.held),
            "-" if item.epochs is None else f"{item.epochs:.2f}",
        ]
        for item in plan.corpora
    ]
    lines = _table(head, rows)
    languages = plan.by_language()
    if languages:
        lines += ["", *_table(["language", *ends, "total"], _language_rows(languages))]
    return "\n".join([*lines, "", *describe_epochs(plan)]).rstrip()


def _ends(plan: Plan) -> list[str]:
    ends = [phase.until for phase in plan.phases[:-1]]
    return [f"to {format_tokens(end or 0)}" for end in ends] + [f"to {format_tokens(plan.tokens)}"]


def _language_rows(languages: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    return [
        [name, *(format_tokens(tokens) for tokens in (*by_phase, sum(by_phase)))]
        for name, by_phase in languages.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
