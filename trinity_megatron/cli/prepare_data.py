"""``trinity-megatron prepare-data``."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron.cli.engine_flags import add_engine_flags, read_engine
from trinity_megatron.errors import UserError
from trinity_megatron.process.rank import quiet_megatron


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "prepare-data",
        help="make a tokenizer and training data from text",
        description="Make a tokenizer, training data and validation data from text.  Data that "
        "are already there, made from the same sources, are kept.  What a file holds is decided by "
        "its content: plain text, JSON (lines, arrays, objects), CSV, parquet, Arrow and saved "
        "datasets, also inside of gzip, bzip2, xz, zstd and lz4.",
        epilog="Rule for what is left out: files in a folder that are no UTF-8 text are left out "
        "and counted.  Those that may hold text all the same (other encodings, archives, PDF, "
        "files that cannot be read; not pictures and other binary files, hidden files and empty "
        "ones) may be at most the --max-left-out share of the bytes, else nothing is written and "
        "the exit code is 2.  Damaged data files and rows without the text field are errors.  "
        "docs/data.md has the details.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--source",
        nargs="+",
        type=Path,
        default=(),
        metavar="PATH",
        help="text and code files, JSON, CSV, parquet, Arrow, compressed or not, or folders of "
        "them (default: Python's standard library)",
    )
    _add_reading_flags(parser)
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="number of tokens of the tokenizer that is trained (4096)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of a Hugging Face tokenizer, such as a released model's, to use instead of "
        "training one",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the documents held out for validation (%(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that encode, each with one thread (default: this one, with a thread for "
        "each core); with --engine tasks at a time (2).  The data do not depend on it",
    )
    add_engine_flags(parser)
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the rows are conversations (messages with role and content): encode them with the "
        "chat template of --tokenizer; a training learns what the assistant says (docs/chat.md)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file to use, and keep, instead of the template of --tokenizer; 'chatml' for "
        "that of the tokenizers that this command trains",
    )
    parser.set_defaults(command=run, takes_further_flags=False)


def _add_reading_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        help="field or column that holds the text; dots lead into objects: meta.body (text; with "
        "--chat messages)",
    )
    parser.add_argument(
        "--split-on",
        metavar="STRING",
        help=r"cut text files into documents where this stands, for example '<|endoftext|>' or "
        r"'\n\n\n' (\n, \t, \r and \\ are understood)",
    )
    parser.add_argument(
        "--plain-text",
        action="store_true",
        help="read JSON and CSV files as the text they are, as in a corpus of code",
    )
    parser.add_argument(
        "--skip-bad-rows",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N rows that are invalid; one more is an error (%(default)s)",
    )
    parser.add_argument(
        "--max-left-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="largest share of left-out bytes that could be text, see below (%(default)s)",
    )


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Make a tokenizer and data; return the exit code.

    Raises:
        UserError: The flags or the sources are at fault; says how to mend that.
    """
    if args.tokenizer is not None and args.vocab_size is not None:
        raise UserError(
            f"--vocab-size {args.vocab_size} does not go with --tokenizer {args.tokenizer}, which "
            "has its own vocabulary; leave out --vocab-size, or leave out --tokenizer to train one"
        )
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} is below 1. Remedy: 1 or more, or drop it.")
    if args.engine is not None and args.tokenizer is None and not args.chat:
        raise UserError(
            f"--engine {args.engine} needs --tokenizer. Remedy: prepare a sample without --engine, "
            "and give the folder tokenizer of its --out."
        )
    _check_chat_flags(args)
    quiet_megatron()
    if args.chat:
        return _run_chat(args)
    from trinity_megatron.data.formats import TEXT_FIELD, ReadOptions
    from trinity_megatron.data.prepare import prepare_data

    options = ReadOptions(
        text_key=TEXT_FIELD if args.text_key is None else args.text_key,
        split_on=None if args.split_on is None else unescape("--split-on", args.split_on),
        skip_bad_rows=args.skip_bad_rows,
        plain_text=args.plain_text,
    )
    common = {
        "validation_fraction": args.validation_fraction,
        "tokenizer": args.tokenizer,
        "options": options,
        "max_left_out": args.max_left_out,
    }
    engine = read_engine(args)
    if engine is not None:
        from trinity_megatron.data.cluster.prepare import prepare_on_cluster

        manifest = prepare_on_cluster(args.out, args.source, engine, **common)
    else:
        vocabulary = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
        manifest = prepare_data(args.out, args.source, **vocabulary, **common, workers=args.workers)
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        print(f"{args.out} {name}: {split.documents:,} documents, {split.tokens:,} tokens")
    _report_short_validation(manifest.validation.tokens)
    return 0


def _check_chat_flags(args: argparse.Namespace) -> None:
    if not args.chat:
        if args.chat_template is not None:
            raise UserError("--chat-template is for conversations. Remedy: add --chat, or drop it.")
        return
    for name, value in (
        ("split-on", args.split_on),
        ("plain-text", args.plain_text or None),
        ("workers", args.workers),
        ("engine", args.engine),
    ):
        if value is not None:
            raise UserError(f"--{name} does not go with --chat. Remedy: drop --{name}.")
    if args.tokenizer is None:
        raise UserError(
            "--chat needs the tokenizer that the model was trained with. Remedy: --tokenizer DIR "
            "(the folder tokenizer of its --data, or beside its checkpoints)."
        )


def _run_chat(args: argparse.Namespace) -> int:
    from trinity_megatron.data.chat.conversations import MESSAGES_FIELD
    from trinity_megatron.data.chat.prepare import prepare_chat
    from trinity_megatron.data.formats import ReadOptions

    options = ReadOptions(
        text_key=MESSAGES_FIELD if args.text_key is None else args.text_key,
        skip_bad_rows=args.skip_bad_rows,
    )
    manifest = prepare_chat(
        args.out,
        args.source,
        tokenizer=args.tokenizer,
        template=args.chat_template,
        validation_fraction=args.validation_fraction,
        options=options,
        max_left_out=args.max_left_out,
    )
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        print(f"{args.out} {name}: {split.documents:,} conversations, {split.tokens:,} tokens")
    for entry in manifest.skipped:
        print(f"left out: {entry.name}: {entry.reason}")
    return 0


def unescape(flag: str, value: str) -> str:
    r"""Replace ``\n``, ``\t``, ``\r`` and ``\\`` by what they stand for.

    Raises:
        UserError: Another letter follows a backslash; names the flag.
    """
    letters = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}

    def replace(match: re.Match[str]) -> str:
        if match[1] not in letters:
            raise UserError(
                f"{flag} {value!r}: {match[0]!r} is not understood; \\n, \\t and \\r are, and "
                "\\\\ for a backslash"
            )
        return letters[match[1]]

    return re.sub(r"\\(.?)", replace, value, flags=re.DOTALL)


def _report_short_validation(num_tokens: int) -> None:
    """Print the presets whose sequences are longer than the whole validation split."""
    from trinity_megatron.model.presets import PRESETS

    lengths = {name: preset.training["seq_length"] for name, preset in PRESETS.items()}
    long = [f"{name} ({length})" for name, length in lengths.items() if length >= num_tokens]
    if long:
        print(
            f"validation has {num_tokens:,} tokens: shorter than a sequence of {', '.join(long)}; "
            "add documents, or raise --validation-fraction"
        )
