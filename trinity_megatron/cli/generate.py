"""``trinity-megatron generate``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron.errors import UserError
from trinity_megatron.process.console import screen_failure
from trinity_megatron.process.rank import quiet_megatron


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with the model of a Megatron checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("--load", required=True, type=Path, metavar="DIR", help="checkpoint")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="at most (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer (default: that of the run)"
    )
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Print a prompt and its continuation; return the exit code.

    Raises:
        UserError: The checkpoint is at fault, or the standard output cannot be written.
    """
    quiet_megatron()
    from trinity_megatron.evaluation.generate import generate

    prompt = args.prompt
    if not prompt.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in prompt):
        # A locale that is not UTF-8, and a text that is.
        prompt = os.fsencode(prompt).decode(errors="replace")
    text = generate(
        args.load,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        tokenizer=args.tokenizer,
    )
    print(prompt + text)
    if failure := screen_failure():
        raise UserError(
            f"the text is not written to the standard output: {failure.strerror}. Remedy: another "
            "place for it."
        )
    return 0
