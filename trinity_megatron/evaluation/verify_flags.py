"""Flags of ``trinity-megatron verify``, for the command and its ranks; imports nothing heavy."""

import argparse
from pathlib import Path

SEQ_LENGTH = 128
TOLERANCE = 2e-5


def add_verify_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--hf", required=True, type=Path, metavar="DIR", help="Hugging Face side")
    parser.add_argument("--megatron", required=True, type=Path, metavar="DIR", help="Megatron side")
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help=".npy or .json with [sequences, length] token ids, or plain numbers (default: random)",
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        default=SEQ_LENGTH,
        metavar="N",
        help="length of the random sequences (%(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest difference of a logit, relative to the largest logit (%(default)s)",
    )
    for part in ("tensor", "pipeline", "expert"):
        parser.add_argument(
            f"--{part}-model-parallel-size", type=int, default=1, metavar="N", help="as in training"
        )
