"""``trinity-megatron data rewrite``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron.errors import UserError


def add_parser(actions: argparse._SubParsersAction) -> None:
    """Add the action to the parser of ``trinity-megatron data``."""
    parser = actions.add_parser(
        "rewrite",
        help="rewrite documents with a language model behind an OpenAI-compatible address",
        description="Make synthetic data: send every document in a prompt to /chat/completions of "
        "a server, and keep the answers, with source, prompt, model and seed of each.  The same "
        "command goes on where it was stopped.  docs/synthetic.md has the details.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--input",
        required=True,
        nargs="+",
        type=Path,
        metavar="PATH",
        help="as --source of "
        "prepare-data: JSON Lines, parquet, text, compressed or not, or folders of them",
    )
    add(
        "--prompt-file",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="a prompt with {text} where the document goes; of several, each document draws one",
    )
    add("--base-url", required=True, metavar="URL", help="for example http://localhost:8000/v1")
    add("--model", required=True, metavar="NAME", help="as the server calls it")
    add(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="documents/ below it is what prepare-data reads",
    )
    add(
        "--api-key-variable",
        metavar="NAME",
        help="environment variable with the API key, which "
        "is sent and nowhere written (default: no key)",
    )
    add("--text-key", default="text", metavar="KEY", help="field of the text in rows (%(default)s)")
    add(
        "--max-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="of an answer; one that is longer counts as failed (%(default)s)",
    )
    add("--temperature", type=float, metavar="T", help="default: the server's")
    add(
        "--seed",
        type=int,
        default=1234,
        help="draws the prompt of each document, and the seed that the server gets (%(default)s)",
    )
    add("--concurrency", type=int, default=16, metavar="N", help="requests at a time (%(default)s)")
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds to wait for an answer (%(default)s)",
    )
    add(
        "--max-failed",
        type=int,
        default=0,
        metavar="N",
        help="documents that may be left out, "
        "because their answer is refused, empty or cut off (%(default)s)",
    )
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Rewrite documents; return the exit code.

    Raises:
        UserError: The flags, the documents or the server are at fault.
    """
    from trinity_megatron.data.rewrite.chat_client import ChatClient, Sampling
    from trinity_megatron.data.rewrite.prompts import read_prompts
    from trinity_megatron.data.rewrite.rewrite import DOCUMENTS_NAME, rewrite
    from trinity_megatron.data.rewrite.settings import RewriteSettings

    _check_numbers(args)
    prompts = read_prompts(args.prompt_file)
    client = ChatClient(
        args.base_url,
        Sampling(args.model, args.max_tokens, args.temperature),
        api_key=_read_key(args.api_key_variable),
        connections=args.concurrency,
        timeout=args.timeout,
    )
    settings = RewriteSettings(
        tuple(prompts), args.model, args.seed, args.temperature, args.text_key
    )
    totals = rewrite(
        args.out.resolve(),
        args.input,
        settings,
        client,
        concurrency=args.concurrency,
        max_failed=args.max_failed,
    )
    print(
        f"{args.out / DOCUMENTS_NAME}: {totals.documents:,} documents, {totals.asked:,} of them "
        f"rewritten now ({totals.tokens:,} tokens); {totals.failed:,} failed"
    )
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, least in (("max_tokens", 1), ("concurrency", 1), ("max_failed", 0), ("seed", 0)):
        value = getattr(args, flag)
        if value < least:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {value} is below {least}. Remedy: {least} or more.")
    if not args.timeout > 0:
        raise UserError(f"--timeout {args.timeout} is not above 0. Remedy: seconds, such as 600.")
    if args.temperature is not None and not args.temperature >= 0:
        raise UserError(f"--temperature {args.temperature} is below 0. Remedy: 0 or more.")


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"--api-key-variable {variable}: the environment has no such variable, or it is empty. "
            f"Remedy: export {variable}, or drop the flag for a server without a key."
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"--api-key-variable {variable}: its value cannot be sent in a header.")
    return key
