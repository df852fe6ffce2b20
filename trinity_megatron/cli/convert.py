"""``trinity-megatron convert``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron.errors import UserError
from trinity_megatron.process.rank import quiet_megatron


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "convert",
        help="Hugging Face checkpoint <-> Megatron checkpoint",
        description="Convert between a Hugging Face checkpoint (safetensors) and a Megatron one "
        "(torch_dist, for any parallel layout).  Memory holds a few tensors.  Interrupted, it goes "
        "on where it was when started again.",
        allow_abbrev=False,
    )
    for flag, words in (
        ("--from-hf", "Hugging Face checkpoint to read"),
        ("--to-megatron", "Megatron checkpoint to write"),
        ("--from-megatron", "Megatron checkpoint to read: what --save was, or one iteration"),
        ("--to-hf", "Hugging Face checkpoint to write"),
        ("--tokenizer", "tokenizer for --to-hf (default: that of the run)"),
    ):
        parser.add_argument(flag, type=Path, metavar="DIR", help=words)
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="largest weight file for --to-hf (default: 5GB, or the files that it began with)",
    )
    parser.add_argument(
        "--no-verify-checksums",
        action="store_false",
        dest="verify_checksums",
        help="do not compare the checksums that the Megatron checkpoint was saved with",
    )
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Convert a checkpoint; return the exit code.

    Raises:
        UserError: The flags contradict each other, or a checkpoint is at fault.
    """
    to_megatron = (args.from_hf, args.to_megatron)
    to_hf = (args.from_megatron, args.to_hf)
    if all(to_megatron) == all(to_hf) or any(to_megatron) == any(to_hf):
        raise UserError(
            "convert takes either --from-hf DIR --to-megatron DIR or --from-megatron DIR --to-hf "
            "DIR."
        )
    if all(to_megatron) and (args.tokenizer or args.max_shard_size):
        raise UserError("--tokenizer and --max-shard-size belong to --to-hf. Remedy: drop them.")
    if all(to_megatron) and not args.verify_checksums:
        raise UserError("--no-verify-checksums belongs to --from-megatron. Remedy: drop it.")
    quiet_megatron()
    from trinity_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
    from trinity_megatron.checkpoint.hf_export import MAX_SHARD_SIZE

    if all(to_megatron):
        hf_to_megatron(*to_megatron)
    else:
        size = args.max_shard_size or MAX_SHARD_SIZE
        megatron_to_hf(
            *to_hf,
            tokenizer=args.tokenizer,
            max_shard_size=size,
            verify_checksums=args.verify_checksums,
        )
    return 0
