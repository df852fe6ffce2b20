"""``trinity-megatron report``."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
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
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Write the report of a run; return the exit code.

    Raises:
        UserError: A folder is at fault.
    """
    from trinity_megatron.report.report import report_run

    report = report_run(args.run_dir, args.out)
    if report.verdict is not None:
        print(report.verdict.headline)
    number = len(report.pictures)
    if not number:
        print(f"{args.run_dir}: no step is recorded yet, or its event files are damaged")
    print(f"{report.page} and {number} picture{'' if number == 1 else 's'}")
    return 0
