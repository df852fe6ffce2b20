"""The report of the suite as a Markdown page."""

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from trinity_megatron.doctor import environment
from trinity_megatron.doctor.result import PartResult, Settings, Table

REPORTS = environment.ROOT / "tests" / "performance_tests" / "reports"


def default_path(settings: Settings) -> Path:
    """Where the report goes: among the checkout's on a GPU, else into the suite's folder."""
    name = re.sub(r"[^a-z0-9]+", "-", environment.device_name(settings).lower()).strip("-")
    folder = REPORTS if settings.on_gpu and REPORTS.is_dir() else settings.out
    return folder / f"{date.today().isoformat()}-gpu-check-{name}.md"


def render(results: Sequence[PartResult], settings: Settings, command: str) -> str:
    """The page: summary, what was skipped and why, the tables of every part."""
    device = environment.device_name(settings)
    commit = environment.commit()
    lines = [
        f"# gpu-check on {device}, {date.today().isoformat()}",
        "",
        f"Commit {commit or 'unknown (no git)'}.  Command: `{command}`",
        "",
        "| part | status | seconds | reason |",
        "|---|---|---|---|",
        *(f"| {r.name} | {r.status} | {r.seconds:.1f} | {_cell(r.reason)} |" for r in results),
        "",
        f"Total {sum(r.seconds for r in results):.0f} s.",
        "",
    ]
    skipped = [(r.name, what) for r in results for what in r.skipped]
    skipped += [(r.name, r.reason) for r in results if r.status == "skipped"]
    if skipped:
        lines += ["## Skipped", "", *(f"* {name}: {what}" for name, what in skipped), ""]
    for result in results:
        if not result.tables and not result.notes:
            continue
        lines += [f"## {result.name}", ""]
        for table in result.tables:
            lines += [*_markdown(table), ""]
        for note in result.notes:
            lines += [note, ""]
    return "\n".join(lines)


def _markdown(table: Table) -> list[str]:
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    return [f"{table.title}", "", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
