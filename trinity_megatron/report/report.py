"""The report of a run: one HTML page with everything embedded, and its pictures as PNG files."""

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from trinity_megatron.errors import MissingInputError, UserError
from trinity_megatron.report import figures
from trinity_megatron.report.balance_figures import draw_expert_load
from trinity_megatron.report.balance_verdict import Verdict, judge_balance
from trinity_megatron.report.figures import draw_loss
from trinity_megatron.report.history import RunHistory
from trinity_megatron.report.page import DrawnPicture, render_page
from trinity_megatron.report.pictures import PICTURES, Picture
from trinity_megatron.report.scores import FOLDER_NAME, read_table
from trinity_megatron.telemetry.tensorboard_log import EVENT_FILES, RunLog

__all__ = ["Report", "draw_expert_load", "draw_loss", "report_run", "write_report"]

PAGE_NAME = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: The HTML file.
        pictures: The PNG files, in the order of the page.
        verdict: On the load of the experts; None if the run has no token counts.
    """

    page: Path
    pictures: tuple[Path, ...]
    verdict: Verdict | None


def write_report(
    log: RunLog,
    folder: Path | str,
    *,
    title: str,
    period: tuple[datetime, datetime] | None = None,
    unigram_entropy: float | None = None,
    scores: Path | None = None,
) -> Report:
    """Write the page and its pictures; the page names what the run has not recorded.

    Args:
        log: The run.
        folder: Where ``report.html`` and the PNG files go; made if missing.
        title: Name of the run.
        period: When it ran.
        unigram_entropy: Nats per token, for a line in the picture of the loss.
        scores: Folder with the results of evaluations; None without.

    Returns:
        Paths and verdict.

    Raises:
        UserError: ``folder`` is a file, or a file of results is damaged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file. Remedy: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    history = RunHistory(log)
    verdict = judge_history(history)
    drawn = [_draw(picture, history, folder, unigram_entropy) for picture in PICTURES]
    page = folder / PAGE_NAME
    table = None if scores is None else read_table(scores)
    page.write_text(render_page(title, history, verdict, drawn, period, table), encoding="utf-8")
    written = tuple(picture.path for picture in drawn if picture.path is not None)
    return Report(page, written, verdict)


def _draw(
    picture: Picture, history: RunHistory, folder: Path, unigram_entropy: float | None
) -> DrawnPicture:
    draw = picture.draw
    if draw is figures.loss_figure:
        draw = partial(figures.loss_figure, unigram_entropy=unigram_entropy)
    figure = draw(history)
    path = folder / f"{picture.name}.png"
    if figure is None:
        path.unlink(missing_ok=True)  # of an earlier report
    else:
        figures.save(figure, path)
    return DrawnPicture(
        chapter=picture.chapter,
        title=picture.title,
        caption=picture.caption,
        path=None if figure is None else path,
        tags=picture.tags,
    )


def judge_history(history: RunHistory) -> Verdict | None:
    """The verdict on a run; None without token counts."""
    if not history.has_experts:
        return None
    return judge_balance(
        history.steps,
        history.tokens_per_expert,
        expert_bias=history.expert_bias if history.bias_steps.size else None,
        topk=history.topk,
        layer_names=history.layer_names,
    )


def report_run(run_dir: Path | str, out: Path | str | None = None) -> Report:
    """Write the report of a run's folder.

    Args:
        run_dir: What ``--out`` or ``--tensorboard-dir`` was.
        out: Folder to write; ``run_dir/report`` if None.

    Returns:
        Paths and verdict.

    Raises:
        MissingInputError: There is no event file.
        UserError: ``out`` is a file, or a file of results is damaged.
    """
    run_dir = Path(run_dir)
    log = RunLog(find_events(run_dir))
    return write_report(
        log,
        run_dir / "report" if out is None else out,
        title=run_dir.resolve().name,
        period=log.period(),
        scores=run_dir / FOLDER_NAME,
    )


def find_events(run_dir: Path) -> Path:
    """The folder with the event files: ``run_dir/tensorboard``, or ``run_dir`` itself.

    Raises:
        MissingInputError: Neither has one.
    """
    for folder in (run_dir / "tensorboard", run_dir):
        if any(folder.glob(EVENT_FILES)):
            return folder
    raise MissingInputError(
        f"RUN_DIR {run_dir} has no TensorBoard event file, neither itself nor in its folder "
        "tensorboard. Remedy: give the folder that train --out (or --tensorboard-dir) wrote."
    )
