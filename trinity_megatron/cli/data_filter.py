"""``trinity-megatron data filter``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron.cli.engine_flags import add_engine_flags, read_engine
from trinity_megatron.errors import UserError


def add_parser(actions: argparse._SubParsersAction) -> None:
    """Add the action to the parser of ``trinity-megatron data``."""
    parser = actions.add_parser(
        "filter",
        help="send documents through datatrove's steps: language, quality, duplicates",
        description="Read documents with one of datatrove's readers, send them through its steps, "
        "and write those that are left as JSON Lines for prepare-data.  A command that was "
        "stopped goes on with what is missing.  docs/data.md describes the file.",
        allow_abbrev=False,
    )
    parser.add_argument("steps", type=Path, metavar="STEPS.yaml", help="reader and steps")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tasks",
        type=int,
        default=8,
        metavar="N",
        help="tasks of a stage, which share the files of the reader (%(default)s)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="tasks at a time (2)")
    add_engine_flags(parser, default="local")
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Filter documents; return the exit code.

    Raises:
        UserError: A flag, a step or a document is at fault.
    """
    from trinity_megatron.data.cluster.filter import filter_documents
    from trinity_megatron.data.cluster.steps import read_steps

    for name in ("tasks", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is below 1. Remedy: 1 or more.")
    engine = read_engine(args)
    assert engine is not None
    engine.check()
    steps = read_steps(args.steps)
    documents = filter_documents(args.out.resolve(), steps, engine, num_tasks=args.tasks)
    print(f"{documents}: prepare-data --source {documents}")
    return 0
