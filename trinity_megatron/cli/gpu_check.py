"""``trinity-megatron gpu-check``."""

import argparse
from collections.abc import Sequence

from trinity_megatron.process.rank import quiet_megatron


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "gpu-check",
        help="check what this machine's GPU computes, and how fast",
        add_help=False,  # the suite has a parser of its own
        allow_abbrev=False,
    )
    parser.set_defaults(command=run, takes_further_flags=True)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Check the GPU with the flags in ``others``; return the exit code of the suite."""
    quiet_megatron()
    from trinity_megatron.doctor import main as suite

    return suite.main(others)
