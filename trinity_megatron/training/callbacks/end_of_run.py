"""What a run shows at its end: pictures, loss against the unigram entropy, a continuation."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_tokenizer,
    get_wandb_writer,
)
from megatron.training.utils import is_last_rank

from trinity_megatron.data.unigram import unigram_entropy
from trinity_megatron.model.generation import generate_tokens
from trinity_megatron.process.screen import tell
from trinity_megatron.report.scores import FOLDER_NAME
from trinity_megatron.telemetry.tensorboard_log import RunLog
from trinity_megatron.training.datasets.splits import split_sources

if TYPE_CHECKING:
    from trinity_megatron.report.report import Report

PROMPT_TOKENS, NEW_TOKENS = 64, 64
_PROMPT_LINES = 4


def _complete(args: argparse.Namespace) -> int:
    """Samples of an evaluation on this rank."""
    return args.eval_iters * args.eval_global_batch_size // args.data_parallel_size


class ValidationTokens:
    """Histogram of the label tokens of the latest evaluation.

    Attributes:
        counts: int64 ``[padded vocabulary size]``; None before the first evaluation.
        samples: Samples of it so far.
    """

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None
        self.samples = 0

    def observe(
        self,
        model: torch.nn.Module,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
    ) -> None:
        """Count the labels of a validation batch that have a loss.

        Args:
            model: Counts nothing while it trains.
            labels: ``[b, s / cp]`` on this rank; None on a stage without.
            loss_mask: fp32, same shape.
        """
        if model.training or labels is None or loss_mask is None:
            return
        args = get_args()
        if self.counts is None or self.samples >= _complete(args):  # another evaluation begins
            self.samples = 0
            self.counts = torch.zeros(
                args.padded_vocab_size, dtype=torch.int64, device=labels.device
            )
        # Not the rows: packed documents of a micro-batch are one.
        self.samples += labels.numel() * args.context_parallel_size // args.seq_length
        # Not bincount, which waits for the device to learn the largest label.
        self.counts.scatter_add_(0, labels.flatten(), loss_mask.flatten().long())

    def entropy(self) -> float | None:
        """Unigram entropy in nats per token over all ranks' tokens.

        Call it on every rank of the last pipeline stage.

        Returns:
            None without evaluation, and after one that ended early (--exit-duration-in-mins).
        """
        if self.counts is None or self.samples < _complete(get_args()):
            return None
        counts = self.counts.clone()
        torch.distributed.all_reduce(
            counts, group=mpu.get_data_parallel_group(with_context_parallel=True)
        )
        return unigram_entropy(counts.cpu().numpy())


def finish_run(
    model: list[torch.nn.Module],
    reached: int,
    validation: ValidationTokens,
    *,
    is_complete: bool = True,
) -> None:
    """Write the pictures and say how the run went; call it on every rank after ``pretrain()``.

    The run is complete and saved: what fails here is said, and changes nothing about that.

    Args:
        model: The model chunks that were trained.
        reached: The last step.
        validation: What the validation has seen.
        is_complete: Whether that is the last of ``--train-iters``.
    """
    args = get_args()
    try:
        entropy = attempt("the unigram entropy", validation.entropy)
        text = continue_text(model)
        if is_last_rank():
            _finish_on_last_rank(args, entropy, text or (), reached, is_complete)
    except KeyboardInterrupt:
        _say(f"interrupted: the run is complete; {_report_again(args)}")
        raise


def attempt[Value](what: str, make: Callable[[], Value], remedy: str = "") -> Value | None:
    """Make a part of the end of a run; say in a line why it is not made.

    What is not the machine's fault is ours, and has its trace behind the line.

    Args:
        what: The part.
        make: Makes it.
        remedy: How to get it in another way.

    Returns:
        None if it fails.
    """
    try:
        return make()
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        _say(f"{what} is not made: {reason}{remedy and '; '}{remedy}")
        if not isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
            tell(traceback.format_exc(), is_error=True)
        return None


def _say(message: str) -> None:
    tell(f"> {message}", is_error=True)


def _report_again(args: argparse.Namespace) -> str:
    return f"trinity-megatron report {args.out} writes the report"


def _finish_on_last_rank(
    args: argparse.Namespace,
    entropy: float | None,
    text: Sequence[str],
    reached: int,
    is_complete: bool,
) -> None:
    made = attempt("the report", lambda: _make_report(args, entropy), _report_again(args))
    log, report = made or (None, None)
    lines = [
        "",
        f"Steps                 {reached}, of which {args.iteration} before this start",
        f"To go on              the same command{' with a larger --train-iters N' * is_complete}",
        f"To start anew         remove {args.out}",
        f"Run folder            {args.out}",
    ]
    if report is not None:
        lines.append(f"Report                {report.page} (open it in a browser)")
    # With --skip-train Megatron prints the loss and logs none.
    losses = list(log.scalars("lm loss validation").values()) if log else []
    if losses and entropy is not None and not args.skip_train:
        # Megatron logs the loss on a test set, which it reads at the end, under the same name.
        name = "Test" if args.do_test else "Validation"
        lines += [
            f"{f'{name} loss':<22}{losses[-1]:.4f} nats per token",
            f"Unigram entropy       {entropy:.4f} nats per token (the same tokens)",
            f"Below it by           {entropy - losses[-1]:.4f} nats per token",
        ]
    pictures = report.pictures if report is not None else ()
    url = attempt("the upload to W&B", lambda: _upload(pictures, reached))
    if url:
        lines.append(f"W&B                   {url}")
    if report is not None and report.verdict is not None:
        lines.append(f"Expert load           {report.verdict.headline}")
    if text:
        lines += ["", "A held-out prompt and the model's continuation:", "", *text]
    tell("\n".join(lines) + "\n")


def _make_report(
    args: argparse.Namespace, entropy: float | None
) -> tuple[RunLog, Report] | tuple[None, None]:
    """What the run has logged, and the report of it; None without a log."""
    writer = get_tensorboard_writer()
    if writer is None:
        return None, None
    writer.flush()
    # Here, because it takes matplotlib a second to load, and only the last rank needs it.
    from trinity_megatron.report.report import write_report

    log, out = RunLog(args.tensorboard_dir), Path(args.out)
    return log, write_report(
        log,
        out / "report",
        title=out.name,
        period=log.period(),
        unigram_entropy=entropy,
        scores=out / FOLDER_NAME,
    )


def _upload(pictures: Sequence[Path], reached: int) -> str | None:
    """Log the pictures to W&B; its address, if there is one."""
    writer = get_wandb_writer()
    if writer is None:
        return None
    for picture in pictures:
        writer.log_image(f"report/{picture.stem}", _read_pixels(picture), reached)
    return writer.url


def _read_pixels(picture: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def continue_text(model: list[torch.nn.Module]) -> Sequence[str] | None:
    """Continue the start of a validation document greedily; call it on every rank.

    Returns:
        Lines to print; none where the layout cuts a sequence or the layers over ranks (pipeline or
        context parallel), without validation data, or where that fails.
    """
    args = get_args()
    if args.pipeline_model_parallel_size > 1 or args.context_parallel_size > 1:
        return None
    prompt = attempt("a continuation", lambda: choose_prompt(args))
    # The forward pass is one of all ranks.
    lacking = torch.tensor(int(prompt is None), device=torch.cuda.current_device())
    torch.distributed.all_reduce(lacking)
    if prompt is None or lacking:
        return None
    return attempt("a continuation", lambda: _describe(*_continue(model, prompt)))


def choose_prompt(args: argparse.Namespace) -> torch.Tensor | None:
    """The second half of the longest validation document, at most `PROMPT_TOKENS` of it.

    Of a blend the document is one of its heaviest set.  Of conversations it is the first one, up to
    its first answer.

    Args:
        args: Of the run.

    Returns:
        int64 ``[n]``; None without validation data on this machine.
    """
    sources = [] if args.mock_data else split_sources(args)[1]
    if not sources:
        return None
    source = max(sources, key=lambda source: source.weight or 0.0)
    documents = None if "://" in source.prefix else source.open()
    if documents is None:
        return None
    first, last = source.bounds(len(documents))
    lengths = documents.sequence_lengths[first:last]
    if not lengths.size or not lengths.max():
        return None
    if args.data_is_chat:
        return torch.from_numpy(documents[0][-PROMPT_TOKENS:].astype("int64"))
    longest = documents[first + int(lengths.argmax())]
    start = len(longest) // 2
    return torch.from_numpy(longest[start : start + PROMPT_TOKENS].astype("int64"))


def _continue(
    model: list[torch.nn.Module], prompt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt, and the likeliest tokens after it."""
    args = get_args()
    model[0].eval()
    steps = generate_tokens(
        model[0],
        [prompt.tolist()],
        max_new_tokens=NEW_TOKENS,
        vocab_size=args.tokenizer_vocab_size,
        stop={get_tokenizer().eod} if args.data_is_chat else (),
    )
    return prompt, torch.tensor([token for step in steps for token in step])


def _describe(prompt: torch.Tensor, continuation: torch.Tensor) -> list[str]:
    """Lines with the end of the prompt's text and with that of the continuation."""
    texts = (
        get_tokenizer().detokenize(part.tolist()).split("\n") for part in (prompt, continuation)
    )
    before, after = texts
    return [
        *(f"  | {line}" for line in before[-_PROMPT_LINES:]),
        *(f"  > {line}" for line in after),
    ]
