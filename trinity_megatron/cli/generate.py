"""``trinity-megatron generate``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trinity_megatron.errors import UserError
from trinity_megatron.process.console import screen_failure
from trinity_megatron.process.rank import quiet_megatron

if TYPE_CHECKING:
    from trinity_megatron.evaluation.generate import Generator
    from trinity_megatron.model.generation import Sampling


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "generate",
        help="continue a prompt, or talk",
        description="Continue prompts with the model of a Megatron checkpoint, or talk with it.",
        allow_abbrev=False,
    )
    parser.add_argument("--load", required=True, type=Path, metavar="DIR", help="checkpoint")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; several are continued together",
    )
    what.add_argument(
        "--chat",
        action="store_true",
        help="talk: each line of the standard input is a turn, in the tokenizer's chat template",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="at most (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the likeliest tokens with this probability together (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of samples (%(default)s)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer (default: that of the run)"
    )
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Print prompts and their continuations, or talk; return the exit code.

    Raises:
        UserError: The checkpoint is at fault, or the standard output cannot be written.
    """
    quiet_megatron()
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()  # before anything of Megatron is imported
    from trinity_megatron.evaluation.generate import Generator, check_length
    from trinity_megatron.model.generation import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    check_length(args.max_new_tokens)
    generator = Generator(args.load, tokenizer=args.tokenizer)
    if args.chat:
        _talk(generator, args.max_new_tokens, sampling)
    else:
        prompts = [_as_utf8(prompt) for prompt in args.prompt]
        _continue(generator, prompts, args.max_new_tokens, sampling)
    if failure := screen_failure():
        raise UserError(
            f"the text is not written to the standard output: {failure.strerror}. Remedy: another "
            "place for it."
        )
    return 0


def _as_utf8(prompt: str) -> str:
    if not prompt.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in prompt):
        # A locale that is not UTF-8, and a text that is.
        return os.fsencode(prompt).decode(errors="replace")
    return prompt


def _continue(
    generator: Generator, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling
) -> None:
    """Print one continuation while it is made, several when all are complete."""
    steps = generator.stream(
        [generator.encode(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for new in steps:
            print(new[0], end="", flush=True)
        print()
        return
    texts = list(prompts)
    for new in steps:
        texts = [text + piece for text, piece in zip(texts, new, strict=True)]
    for text in texts:
        print(text)


def _talk(generator: Generator, max_new_tokens: int, sampling: Sampling) -> None:
    """Answer the lines of the standard input, until it ends."""
    from trinity_megatron.data.rows import RowError
    from trinity_megatron.evaluation.generate import Chat

    chat = Chat(generator, max_new_tokens=max_new_tokens, sampling=sampling)
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        try:
            for piece in chat.answer(line.rstrip("\n")):
                print(piece, end="", flush=True)
        except RowError as error:
            raise UserError(f"--chat: {error}") from error
        print(flush=True)
        if chat.is_cut:
            print(f"(cut after --max-new-tokens {max_new_tokens})", file=sys.stderr)
