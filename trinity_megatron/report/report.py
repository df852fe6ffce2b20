"""The report of a run: one HTML page that needs nothing else, and its pictures."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from os import SEEK_CUR
from pathlib import Path

from matplotlib.figure import Figure

from trinity_megatron.errors import UserError
from trinity_megatron.report import figures
from trinity_megatron.report.balance_verdict import Verdict, judge_balance
from trinity_megatron.report.figures import draw_expert_load, draw_loss
from trinity_megatron.report.history import RunHistory
from trinity_megatron.report.page import DrawnPicture, render_page
from trinity_megatron.telemetry.step_statistics import GRADIENT_GROUPS
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, EVENT_FILES, TOKENS_TAG, RunLog

__all__ = ["Report", "draw_expert_load", "draw_loss", "report_run", "run_period", "write_report"]

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


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        chapter: Heading under which it stands.
        name: File name without its ending.
        title: Its own heading.
        caption: How to read it.
        draw: Makes it; None without data.
        tags: What it shows, to say what a run has not recorded.
    """

    chapter: str
    name: str
    title: str
    caption: str
    draw: Callable[[RunHistory], Figure | None]
    tags: tuple[str, ...]


_TRAINING, _BALANCE, _WARNINGS, _SUPPLY = (
    "Training",
    "Balance of the experts",
    "Early warnings",
    "Data and speed",
)

PICTURES = (
    Picture(
        _TRAINING,
        "loss",
        "Loss",
        "Mean loss of the training steps and, as dots, of the validation data. Both should fall; "
        "training far below validation is overfitting, a jump that does not come back is "
        "instability. The pale band is the range within each stretch of steps. A dashed line, if "
        "there is one, is the loss of a model that knows only how frequent each token is.",
        figures.loss_figure,
        ("lm loss", "lm loss validation"),
    ),
    Picture(
        _TRAINING,
        "schedule",
        "Learning rates and batch size",
        "Muon's learning rate applies to the matrices of the hidden layers, AdamW's to embedding, "
        "LM head and norms. A kink in another picture at the place of a kink here is the schedule.",
        figures.schedule_figure,
        ("lr/muon", "lr/adamw", "batch-size"),
    ),
    Picture(
        _BALANCE,
        "max_violation_map",
        "MaxVio of every layer",
        "One row a MoE layer, the first layer on top; time runs to the right. Pale is "
        "balanced, dark red is a layer in which one expert gets many times its share. A dark row "
        "is a layer in trouble, a dark column a step at which all layers suffered.",
        figures.violation_map_figure,
        (TOKENS_TAG,),
    ),
    Picture(
        _BALANCE,
        "max_violation",
        "MaxVio over the steps",
        "0 is perfect balance, 1 means that the busiest expert gets twice its share. The dotted "
        "line is what chance alone gives, the dashed one the limit for the average layer. With "
        "more than 6 layers the three that are highest at the end have a colour.",
        figures.violation_figure,
        (TOKENS_TAG,),
    ),
    Picture(
        _BALANCE,
        "expert_load",
        "Load of every expert",
        "One strip a layer, one row an expert, time to the right. White: about its share of the "
        "tokens; red: more; blue: less. A row that stays dark red is a favourite, one that stays "
        "dark blue an expert that learns nothing; a balanced run fades to white. Layers with more "
        "than 64 experts are sorted by the load at the end, busiest on top; the 4 busiest and the "
        "4 least busy fill the upper and the lower quarter of the strip, and in between a row is "
        "the mean of neighbours.",
        figures.expert_load_figure,
        (TOKENS_TAG,),
    ),
    Picture(
        _BALANCE,
        "load_spread",
        "Spread of the load",
        "Load relative to the mean of its layer: the highest and lowest of all layers, and "
        "quantiles averaged over the layers; less than 0.01 is drawn there. They should close in "
        "on 1. Entropy is 1 for perfect balance. An expert without a token for 100 steps is dead.",
        figures.load_spread_figure,
        (
            "moe/load_min",
            "moe/load_q10",
            "moe/load_median",
            "moe/load_q90",
            "moe/load_max",
            "moe/load_entropy",
            "moe/load_entropy_min",
            "moe/dead_experts",
            "moe/dead_experts_window",
        ),
    ),
    Picture(
        _BALANCE,
        "expert_bias",
        "Bias of the experts",
        "What is added to an expert's router score (between 0 and 1) when the experts of a token "
        "are chosen. One line an expert or, with many experts or layers, bands over the experts. "
        "The bias should level off once the load is balanced; bands that open steadily mean that "
        "it fights the router.",
        figures.expert_bias_figure,
        (BIAS_TAG,),
    ),
    Picture(
        _WARNINGS,
        "logits",
        "Logits",
        "Steady growth of a highest logit is the usual first sign of instability, long before the "
        "loss shows it. The bound of the attention logits is an upper bound from the norms of "
        "queries and keys, not the logits themselves.",
        figures.logits_figure,
        (
            "router/max_logit",
            "router/mean_logit",
            "router/logit_std",
            "lm_head/max_logit",
            "lm_head/mean_logit",
            "lm_head/mean_logsumexp",
            "lm_head/z_loss",
            "attention/max_logit_bound",
        ),
    ),
    Picture(
        _WARNINGS,
        "gradient_norm",
        "Gradient norms",
        "Before clipping, on a logarithmic axis. A group that leaves the others is where trouble "
        "starts; single spikes are normal.",
        figures.gradient_norm_figure,
        ("grad-norm", *(f"grad_norm/{name}" for name in GRADIENT_GROUPS)),
    ),
    Picture(
        _SUPPLY,
        "batches",
        "Batches",
        "BatchHet is how much worse the worst micro-batch of a step is than the mean: lower is "
        "better mixed data, and 0 is a step of one micro-batch. The sequence-wise balance loss is "
        "1 when the experts are balanced within each sequence.",
        figures.data_figure,
        ("data/batch_het", "seq_load_balancing_loss"),
    ),
    Picture(
        _SUPPLY,
        "throughput",
        "Throughput",
        "Without evaluation and checkpoints. MFU is the share of the hardware's peak that the "
        "model's arithmetic reaches.",
        figures.throughput_figure,
        ("speed/tokens_per_second", "speed/mfu"),
    ),
)


def write_report(
    log: RunLog,
    folder: Path | str,
    *,
    title: str,
    period: tuple[datetime, datetime] | None = None,
    unigram_entropy: float | None = None,
) -> Report:
    """Write the page and its pictures; what the run has not recorded is left out and named.

    Args:
        log: The run.
        folder: Where ``report.html`` and the PNG files go; made if missing.
        title: Name of the run.
        period: When it ran.
        unigram_entropy: Nats per token, for a line in the picture of the loss.

    Returns:
        Paths and verdict.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file. Remedy: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    history = RunHistory(log)
    verdict = judge_history(history)
    drawn = [_draw(picture, history, folder, unigram_entropy) for picture in PICTURES]
    page = folder / PAGE_NAME
    page.write_text(render_page(title, history, verdict, drawn, period), encoding="utf-8")
    return Report(page, tuple(d.path for d in drawn if d.path is not None), verdict)


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

    Raises:
        FileNotFoundError: There is no event file.
    """
    run_dir = Path(run_dir)
    events = find_events(run_dir)
    return write_report(
        RunLog(events),
        run_dir / "report" if out is None else out,
        title=run_dir.resolve().name,
        period=run_period(events),
    )


def find_events(run_dir: Path) -> Path:
    """The folder with the event files: ``run_dir/tensorboard``, or ``run_dir`` itself.

    Raises:
        FileNotFoundError: Neither has one.
    """
    for folder in (run_dir / "tensorboard", run_dir):
        if any(folder.glob(EVENT_FILES)):
            return folder
    raise FileNotFoundError(
        f"RUN_DIR {run_dir} has no TensorBoard event file, neither itself nor in its folder "
        "tensorboard. Remedy: give the folder that train --out (or --tensorboard-dir) wrote."
    )


def run_period(tensorboard_dir: Path) -> tuple[datetime, datetime] | None:
    """When the first and the last event of a run were written, in UTC; None without events."""
    times = [time for path in tensorboard_dir.glob(EVENT_FILES) for time in _event_times(path)]
    if not times:
        return None
    first, last = (datetime.fromtimestamp(moment, UTC) for moment in (min(times), max(times)))
    return first, last


def _event_times(path: Path) -> Iterator[float]:
    """Wall time of each event in seconds, from the first field alone: the events are large.

    A record is its length (uint64), a checksum (4 bytes), the event and another checksum; an event
    begins with field 1, a double.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(start := file.read(21)) == 21:
            length, _, field, moment = struct.unpack("<QIBd", start)
            if length > size:  # no record
                return
            if field == 9:
                yield moment
            file.seek(length - 9 + 4, SEEK_CUR)
