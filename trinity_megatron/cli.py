"""The command line: ``trinity-megatron prepare-data | train | gpu-check``."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron import __version__

_USER_ERROR = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        Exit code: 0, 2 if the input is at fault, 130 if interrupted, or that of the run.
    """
    parser = build_parser()
    # Abbreviations are off: --data-parallel... must reach Megatron and not be taken for --data.
    args, others = parser.parse_known_args(argv)
    if others and not args.takes_further_flags:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trinity_megatron").setLevel(logging.INFO)
    try:
        return args.command(args, others)
    except (ValueError, OSError) as error:
        if os.environ.get("TRINITY_DEBUG") == "1":
            raise
        print(f"trinity-megatron: error: {error}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; building it imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="trinity-megatron",
        description="Pretrain Arcee's Trinity models with NVIDIA Megatron-Core.",
        epilog="Set TRINITY_DEBUG=1 to see the Python trace of an error.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_prepare_data(commands)
    _add_train(commands)
    _add_gpu_check(commands)
    return parser


def _add_prepare_data(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "prepare-data",
        help="make a tokenizer and training data from text",
        description="Make a tokenizer, training data and validation data from text.  Data that "
        "are already there, made from the same sources, are kept.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--source",
        nargs="+",
        type=Path,
        default=(),
        metavar="PATH",
        help="text and code files, .jsonl, .parquet, or folders of them "
        "(default: Python's standard library)",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="number of tokens (%(default)s)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the documents held out for validation (%(default)s)",
    )
    parser.set_defaults(command=_prepare_data, takes_further_flags=False)


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train on this machine",
        description="Train on this machine, with one rank per GPU, or one on a CPU.  Every other "
        "flag is passed to Megatron, for example --train-iters 200 --lr 5e-3 "
        "--tensor-model-parallel-size 2 --sequence-parallel; it takes precedence over the preset.",
        epilog="Several machines: torchrun or srun over examples/pretrain_trinity.py.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", default="tiny", metavar="NAME", help="tiny (default), nano, mini or large"
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder that prepare-data made"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the run; continued if it has begun"
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks (default: GPUs, or 1)")
    parser.set_defaults(command=_train, takes_further_flags=True)


def _add_gpu_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "gpu-check",
        help="check the GPUs of this machine",
        description="Check the GPUs of this machine and the software for them.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(command=_gpu_check, takes_further_flags=True)


def _prepare_data(args: argparse.Namespace, others: Sequence[str]) -> int:
    from trinity_megatron.data.dataset import prepare_data

    manifest = prepare_data(
        args.out,
        args.source,
        vocab_size=args.vocab_size,
        validation_fraction=args.validation_fraction,
    )
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        print(f"{args.out} {name}: {split.documents:,} documents, {split.tokens:,} tokens")
    return 0


def _train(args: argparse.Namespace, others: Sequence[str]) -> int:
    from trinity_megatron import launcher

    return launcher.train(
        others, preset=args.preset, data=args.data, out=args.out, nproc=args.nproc
    )


def _gpu_check(args: argparse.Namespace, others: Sequence[str]) -> int:
    from trinity_megatron import gpu_check

    return gpu_check.main(others)


if __name__ == "__main__":
    sys.exit(main())
