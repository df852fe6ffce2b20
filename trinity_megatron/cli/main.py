"""The command line: ``trinity-megatron prepare-data | train | convert | ... ``."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from trinity_megatron import __version__
from trinity_megatron.cli import (
    convert,
    data,
    doctor,
    dry_run,
    evaluate,
    export,
    generate,
    gpu_check,
    plan,
    prepare_data,
    report,
    run,
    supervise,
    train,
    verify,
)
from trinity_megatron.errors import UserError
from trinity_megatron.process.console import make_screen_safe
from trinity_megatron.process.rank import USER_ERROR, describe_error, is_user_error
from trinity_megatron.process.temporary import use_short_temporary_folder

_INTERRUPTED = 130

# In the order of --help.
_COMMANDS = (
    doctor,
    prepare_data,
    data,
    plan,
    dry_run,
    train,
    supervise,
    run,
    convert,
    verify,
    export,
    generate,
    evaluate,
    report,
    gpu_check,
)


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
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
