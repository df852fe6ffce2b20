"""The command line: ``trinity-megatron prepare-data | train | convert | ... ``."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron import __version__
from trinity_megatron.errors import UserError
from trinity_megatron.evaluation.verify_flags import add_verify_flags
from trinity_megatron.process.console import make_screen_safe, screen_failure
from trinity_megatron.process.rank import (
    USER_ERROR,
    describe_error,
    is_user_error,
    quiet_megatron,
)
from trinity_megatron.process.temporary import use_short_temporary_folder

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        Exit code: 0, 2 if the input is at fault, 130 if interrupted, or that of the run.
    """
    make_screen_safe()
    parser = build_parser()
    # Abbreviations are off: --data-parallel... must reach Megatron and not be taken for --data.
    args, others = parser.parse_known_args(argv)
    if others and not args.takes_further_flags:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trinity_megatron").setLevel(logging.INFO)
    try:
        use_short_temporary_folder()
        return args.command(args, others)
    except (UserError, OSError) as error:
        if not is_user_error(error) or os.environ.get("TRINITY_DEBUG") == "1":
            raise
        print(f"trinity-megatron: error: {describe_error(error)}", file=sys.stderr)
        return USER_ERROR
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
    _add_convert(commands)
    _add_verify(commands)
    _add_generate(commands)
    _add_report(commands)
    _add_gpu_check(commands)
    return parser


def _add_prepare_data(commands: argparse._SubParsersAction) -> None:
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
    parser.set_defaults(command=_prepare_data, takes_further_flags=False)


def _add_reading_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="field or column that holds the text; dots lead into objects: meta.body (%(default)s)",
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


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train on this machine",
        description="Train on this machine, with one rank per GPU, or one on a CPU.  Every other "
        "flag is passed to Megatron, for example --train-iters 200 --lr 5e-3 "
        "--keep-last 3 (checkpoints) --tensor-model-parallel-size 2 --sequence-parallel; it takes "
        "precedence over the preset.",
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


def _add_convert(commands: argparse._SubParsersAction) -> None:
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
    parser.set_defaults(command=_convert, takes_further_flags=False)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare a Megatron checkpoint with a Hugging Face one",
        description="Run transformers and Megatron on the same tokens in fp32 and compare logits, "
        "hidden states and routing.  Exit code 1 beyond the tolerance.",
        allow_abbrev=False,
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks (%(default)s)")
    add_verify_flags(parser)
    parser.set_defaults(command=_verify, takes_further_flags=False)


def _add_generate(commands: argparse._SubParsersAction) -> None:
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
    parser.set_defaults(command=_generate, takes_further_flags=False)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="draw a run as one web page, with a verdict on its experts",
        description="Draw a run, finished or not, as one web page that needs no network, with a "
        "verdict on the balance of its experts, and as pictures.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="what train --out or --tensorboard-dir was"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: RUN_DIR/report)"
    )
    parser.set_defaults(command=_report, takes_further_flags=False)


def _add_gpu_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "gpu-check",
        help="check what this machine's GPU computes, and how fast",
        add_help=False,  # the suite has a parser of its own
        allow_abbrev=False,
    )
    parser.set_defaults(command=_gpu_check, takes_further_flags=True)


def _prepare_data(args: argparse.Namespace, others: Sequence[str]) -> int:
    if args.tokenizer is not None and args.vocab_size is not None:
        raise UserError(
            f"--vocab-size {args.vocab_size} does not go with --tokenizer {args.tokenizer}, which "
            "has its own vocabulary; leave out --vocab-size, or leave out --tokenizer to train one"
        )
    quiet_megatron()
    from trinity_megatron.data.formats import ReadOptions
    from trinity_megatron.data.prepare import prepare_data

    options = ReadOptions(
        text_key=args.text_key,
        split_on=None if args.split_on is None else _unescape("--split-on", args.split_on),
        skip_bad_rows=args.skip_bad_rows,
        plain_text=args.plain_text,
    )
    vocabulary = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    manifest = prepare_data(
        args.out,
        args.source,
        **vocabulary,
        validation_fraction=args.validation_fraction,
        tokenizer=args.tokenizer,
        options=options,
        max_left_out=args.max_left_out,
    )
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        print(f"{args.out} {name}: {split.documents:,} documents, {split.tokens:,} tokens")
    _report_short_validation(manifest.validation.tokens)
    return 0


def _unescape(flag: str, value: str) -> str:
    r"""Replace ``\n``, ``\t``, ``\r`` and ``\\`` by what they stand for."""
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


def _train(args: argparse.Namespace, others: Sequence[str]) -> int:
    from trinity_megatron.launch import local

    return local.train(others, preset=args.preset, data=args.data, out=args.out, nproc=args.nproc)


def _convert(args: argparse.Namespace, others: Sequence[str]) -> int:
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


def _verify(args: argparse.Namespace, others: Sequence[str]) -> int:
    from trinity_megatron.launch import local

    num_devices = local.count_cuda_devices()
    ranks = local.choose_num_ranks(args.nproc, num_devices)
    module = "trinity_megatron.evaluation.hf_parity"
    flags = []
    for name, value in vars(args).items():
        if name not in ("nproc", "command", "takes_further_flags") and value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return local.launch(flags, num_ranks=ranks, cuda=num_devices > 0, module=module)


def _generate(args: argparse.Namespace, others: Sequence[str]) -> int:
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


def _report(args: argparse.Namespace, others: Sequence[str]) -> int:
    from trinity_megatron.report.report import report_run

    report = report_run(args.run_dir, args.out)
    if report.verdict is not None:
        print(report.verdict.headline)
    number = len(report.pictures)
    if not number:
        print(f"{args.run_dir}: no step is recorded yet, or its event files are damaged")
    print(f"{report.page} and {number} picture{'' if number == 1 else 's'}")
    return 0


def _gpu_check(args: argparse.Namespace, others: Sequence[str]) -> int:
    quiet_megatron()
    from trinity_megatron.doctor import main as suite

    return suite.main(others)


if __name__ == "__main__":
    sys.exit(main())
