"""What a run shows at its end: pictures, loss against the unigram entropy, a continuation."""

from pathlib import Path

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_tokenizer,
    get_wandb_writer,
)
from megatron.training.utils import print_rank_last

from trinity_megatron.data.dataset import unigram_entropy
from trinity_megatron.tracking.run_log import RunLog

PROMPT_TOKENS, NEW_TOKENS = 64, 64


class ValidationTokens:
    """Histogram of the label tokens of the latest evaluation."""

    counts: torch.Tensor | None = None
    samples = 0

    @classmethod
    def observe(cls, model: torch.nn.Module, labels: torch.Tensor | None) -> None:
        """Count the labels of a validation batch; ``[b, s / cp]`` on this rank."""
        if model.training or labels is None:
            return
        args = get_args()
        complete = args.eval_iters * args.eval_global_batch_size // args.data_parallel_size
        if cls.counts is None or cls.samples >= complete:  # another evaluation begins
            cls.samples = 0
            cls.counts = torch.zeros(
                args.padded_vocab_size, dtype=torch.int64, device=labels.device
            )
        cls.samples += labels.shape[0]
        cls.counts += torch.bincount(labels.flatten(), minlength=args.padded_vocab_size)

    @classmethod
    def entropy(cls) -> float | None:
        """Unigram entropy in nats per token over all ranks' tokens; None without evaluation.

        Call it on every rank of the last pipeline stage.
        """
        if cls.counts is None:
            return None
        counts = cls.counts.clone()
        torch.distributed.all_reduce(
            counts, group=mpu.get_data_parallel_group(with_context_parallel=True)
        )
        return unigram_entropy(counts.cpu().numpy())


def finish_run(model: list[torch.nn.Module]) -> None:
    """Write the pictures and say how the run went; call it on every rank after ``pretrain()``.

    Args:
        model: The model chunks that were trained.
    """
    args = get_args()
    entropy = ValidationTokens.entropy()
    text = continue_text(model)
    writer = get_tensorboard_writer()
    if writer is None:
        return
    writer.flush()
    # Here, because it takes matplotlib a second to load, and only the last rank needs it.
    from trinity_megatron.tracking.report import run_period, write_report

    log, out = RunLog(args.tensorboard_dir), Path(args.out)
    report = write_report(
        log,
        out / "report",
        title=out.name,
        period=run_period(Path(args.tensorboard_dir)),
        unigram_entropy=entropy,
    )
    valid = log.scalars("lm loss validation")
    reached = args.iteration if args.skip_train else args.train_iters
    done = f"{reached}, of which {args.iteration} before this start"
    lines = [
        "",
        f"Steps                 {done}",
        "To go on              the same command with a larger --train-iters N",
        f"To start anew         remove {out}",
        f"Run folder            {out}",
        f"Report                {report.page} (open it in a browser)",
    ]
    if valid and entropy is not None:
        loss = list(valid.values())[-1]
        lines += [
            f"Validation loss       {loss:.4f} nats per token",
            f"Unigram entropy       {entropy:.4f} nats per token (the same tokens)",
            f"Below it by           {entropy - loss:.4f} nats per token",
        ]
    if wandb_writer := get_wandb_writer():
        for picture in report.pictures:
            wandb_writer.log_image(f"report/{picture.stem}", _read_pixels(picture), reached)
        lines += [f"W&B                   {wandb_writer.url}"] if wandb_writer.url else []
    if report.verdict is not None:
        lines.append(f"Expert load           {report.verdict.headline}")
    if text:
        lines += ["", "A held-out prompt and the model's continuation:", "", *text]
    print_rank_last("\n".join(lines) + "\n")


def _read_pixels(picture: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


@torch.no_grad()
def continue_text(model: list[torch.nn.Module]) -> tuple[str, ...]:
    """Continue the start of a validation document greedily.

    Returns:
        Lines to print; empty where the layout cuts a sequence or the layers over ranks (pipeline
        or context parallel), or without validation data.
    """
    args = get_args()
    if args.pipeline_model_parallel_size > 1 or args.context_parallel_size > 1:
        return ()
    if not args.valid_data_path:
        return ()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(args.valid_data_path[0], mmap=True)
    longest = max(range(len(documents)), key=lambda index: len(documents[index]))
    start = len(documents[longest]) // 2
    tokens = torch.from_numpy(documents[longest][start : start + PROMPT_TOKENS].astype("int64"))
    module = unwrap_model(model[0])
    module.eval()
    sequence = tokens.to(torch.cuda.current_device())
    length = PROMPT_TOKENS + NEW_TOKENS
    for position in range(PROMPT_TOKENS, length):
        # One length for all steps: sequence parallelism wants a multiple of its size.
        padded = torch.nn.functional.pad(sequence, (0, length - len(sequence))).unsqueeze(0)
        positions = torch.arange(length, device=padded.device).unsqueeze(0)
        logits = gather_from_tensor_model_parallel_region(module(padded, positions, None))
        likeliest = logits[0, position - 1, : args.tokenizer_vocab_size].argmax()
        sequence = torch.cat([sequence, likeliest.view(1)])
    tokenizer = get_tokenizer()
    prompt, continuation = sequence[:PROMPT_TOKENS], sequence[PROMPT_TOKENS:]
    texts = (tokenizer.detokenize(part.tolist()) for part in (prompt, continuation))
    return tuple(
        f"  {mark} {line}"
        for mark, text in zip("|>", texts, strict=True)
        for line in text.split("\n")
    )
