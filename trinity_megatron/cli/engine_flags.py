"""``--engine`` and its options, which commands that work by tasks share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trinity_megatron.errors import UserError

if TYPE_CHECKING:
    from trinity_megatron.data.cluster.engines import Engine

_WORKERS = 2


def add_engine_flags(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add ``--engine`` and ``--engine-options``."""
    parser.add_argument(
        "--engine",
        choices=("local", "ray", "slurm"),
        default=default,
        help="work by tasks of datatrove's executor, on this machine or a cluster; a command that "
        f"was stopped goes on with what is missing, docs/data.md ({default or 'no tasks'})",
    )
    parser.add_argument(
        "--engine-options",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="arguments of datatrove's executor: partition=cpu time=10:00:00 for slurm",
    )


def read_engine(args: argparse.Namespace) -> Engine | None:
    """Where the tasks run; None without ``--engine``.

    Raises:
        UserError: Flags contradict each other, or an option is none.
    """
    from trinity_megatron.data.cluster.engines import Engine

    if args.engine is None:
        if args.engine_options:
            raise UserError("--engine-options are of --engine. Remedy: add it, or drop them.")
        return None
    options: dict[str, int | str] = {}
    for option in args.engine_options:
        name, separator, value = option.partition("=")
        if not separator or not name.isidentifier():
            raise UserError(f"--engine-options {option!r} is no NAME=VALUE. Remedy: partition=cpu.")
        options[name] = int(value) if value.isdecimal() else value
    return Engine(args.engine, args.workers or _WORKERS, options)
