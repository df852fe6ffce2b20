"""``trinity-megatron export``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trinity_megatron.errors import UserError
from trinity_megatron.process.rank import quiet_megatron

if TYPE_CHECKING:
    import torch

    from trinity_megatron.checkpoint.convert import Run

_FORMATS = ("bf16", "fp8-block", "gguf")
_GGUF_TYPES = ("F32", "BF16", "Q8_0")
_SEQ_LENGTH, _NUM_SEQUENCES = 512, 32
_DIFFERENT = 1


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint for serving (bf16, block FP8, GGUF)",
        description="Write the model of a Megatron checkpoint for serving: in Hugging Face's "
        "layout as it is (bf16) or in block FP8 (vLLM, SGLang), or as a GGUF file (llama.cpp).  "
        "Memory holds a few tensors.  Interrupted, it goes on where it was when started again.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--load", required=True, type=Path, metavar="DIR", help="what --save was, or one iteration")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add(
        "--format",
        choices=_FORMATS,
        default=_FORMATS[0],
        help="bf16 (default): the weights as they are; fp8-block: E4M3 with a scale for each block "
        "of 128 x 128; gguf: DIR/model.gguf",
    )
    add("--gguf-type", choices=_GGUF_TYPES, help="type of the matrices for gguf (default: BF16)")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer (default: that of the run)")
    add("--max-shard-size", metavar="SIZE", help="largest safetensors file (default: 5GB)")
    add(
        "--verify",
        action="store_true",
        help="read the export back, dequantise, and compare its loss with that of the checkpoint; "
        "holds the model in fp32, twice",
    )
    add("--data", type=Path, metavar="DIR", help="prepared data: --verify takes its validation")
    add("--tokens", type=Path, metavar="FILE", help="token ids for --verify, as in verify")
    add(
        "--seq-length",
        type=int,
        metavar="N",
        help=f"length of the sequences of --data (default: {_SEQ_LENGTH})",
    )
    add(
        "--max-loss-difference",
        type=float,
        metavar="NATS",
        help="--verify: exit with 1 if the export is worse by more",
    )
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Export a checkpoint; return the exit code.

    Raises:
        UserError: The flags contradict each other, or the checkpoint is at fault.
    """
    _check_flags(args)
    quiet_megatron()
    from trinity_megatron.checkpoint.convert import export_hf, open_run
    from trinity_megatron.checkpoint.hf_export import MAX_SHARD_SIZE
    from trinity_megatron.export.fp8_encoding import Fp8BlockEncoding
    from trinity_megatron.export.gguf_file import write_gguf

    opened = open_run(args.load, tokenizer=args.tokenizer)
    tokens = _read_tokens(args, opened) if args.verify else None
    if args.format == "gguf":
        write_gguf(opened, args.out, kind=args.gguf_type or "BF16")
    else:
        export_hf(
            opened,
            args.out,
            max_shard_size=args.max_shard_size or MAX_SHARD_SIZE,
            encoding=Fp8BlockEncoding() if args.format == "fp8-block" else None,
        )
    return 0 if tokens is None else _verify(args, opened, tokens)


def _check_flags(args: argparse.Namespace) -> None:
    if args.gguf_type and args.format != "gguf":
        raise UserError("--gguf-type belongs to --format gguf. Remedy: drop it.")
    if args.max_shard_size and args.format == "gguf":
        raise UserError("--max-shard-size does not go with --format gguf. Remedy: drop it.")
    if args.verify and (args.data is None) == (args.tokens is None):
        raise UserError(
            "--verify needs text: either --data DIR with prepared data, or --tokens FILE."
        )
    for_verify = ("data", "tokens", "seq_length", "max_loss_difference")
    given = [name for name in for_verify if getattr(args, name) is not None]
    if given and not args.verify:
        flag = "--" + given[0].replace("_", "-")
        raise UserError(f"{flag} belongs to --verify. Remedy: add --verify, or drop it.")
    if args.seq_length is not None and (args.seq_length < 2 or args.tokens is not None):
        raise UserError(
            f"--seq-length {args.seq_length} is for --data, and at least 2. Remedy: drop it, or "
            "give 2 or more."
        )


def _read_tokens(args: argparse.Namespace, opened: "Run") -> "torch.Tensor":
    """The text of the comparison, int64 ``[b, s]``: read first, so that errors appear at once."""
    from trinity_megatron.checkpoint.vocabulary import get_vocabulary_rows
    from trinity_megatron.evaluation.tokens import read_tokens, read_validation

    rows = opened.config.tokenizer_vocab_size
    rows = rows or get_vocabulary_rows(opened.source.model_tensors())
    if args.tokens is not None:
        tokens = read_tokens(args.tokens, rows)
    else:
        tokens = read_validation(args.data, args.seq_length or _SEQ_LENGTH, _NUM_SEQUENCES)
    if tokens.shape[1] < 2 or tokens.max() >= rows:
        raise UserError(
            f"{args.tokens or args.data}: sequences of {tokens.shape[1]} tokens up to id "
            f"{int(tokens.max())} do not fit a model of {rows} tokens. Remedy: sequences of 2 or "
            "more, of the tokenizer of the run."
        )
    return tokens


def _verify(args: argparse.Namespace, opened: "Run", tokens: "torch.Tensor") -> int:
    """Print what the export costs; return the exit code."""
    from trinity_megatron.checkpoint.transformers_model import load_transformers_model
    from trinity_megatron.evaluation.loss_difference import compare_losses, token_losses
    from trinity_megatron.export.read_back import read_back

    model = load_transformers_model(
        opened.source, opened.config, name=opened.name, assets=opened.assets
    )
    reference = token_losses(model.float(), tokens)
    del model
    result = compare_losses(reference, token_losses(read_back(args.out, opened.config), tokens))
    print(f"{args.format}: {result}")
    limit = args.max_loss_difference
    if limit is not None and not result.difference <= limit:  # NaN is beyond
        print(f"WORSE by more than {limit:g} nats a token")
        return _DIFFERENT
    return 0
