"""``trinity-megatron dry-run``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trinity_megatron.errors import UserError

if TYPE_CHECKING:
    from trinity_megatron.planner.plan import Plan


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "dry-run",
        help="check all flags of a training for a world of any size, and start nothing",
        description="Check all flags of a training as rank 0 of its whole world would, on any "
        "machine, without starting or writing anything; and with --gpu that its memory fits.  "
        "Every other flag is the training's.  DRY_RUN=1 of the scripts in examples/ calls it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--world-size", type=int, required=True, metavar="N", help="ranks of all machines together"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="h100, h200, b200, b300, gb200 or gb300; a CPU without"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also build ranks of every pipeline stage without memory (plan --verify; a minute)",
    )
    parser.set_defaults(command=run, takes_further_flags=True)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Check the flags in ``others``; return the exit code.

    Raises:
        UserError: A flag is at fault; says how to mend that.
    """
    from trinity_megatron.training.dry_run import check_run

    if args.verify and args.gpu is None:
        raise UserError("--verify builds ranks of a plan, which needs --gpu. Remedy: give it.")
    plan = check_run(others, world_size=args.world_size, gpu=args.gpu)
    print(f"> every flag is right for {args.world_size:,} rank{'s' * (args.world_size > 1)}")
    if plan is not None:
        print(describe(plan))
    if not args.verify or plan is None:
        return 0
    from trinity_megatron.cli.plan import verify

    return verify(plan)


def describe(plan: Plan) -> str:
    """Memory and throughput of a plan in one line."""
    gib, (low, high) = 2**30, plan.learned
    needed = sum(plan.fullest.needed) / 2 / gib
    return (
        f"> by the planner: {needed:.0f} of {plan.gpu.memory_bytes / gib:.0f} GiB a GPU "
        f"({plan.gpu.title}), {plan.time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU balanced, "
        f"{low:,.0f} to {high:,.0f} under learned routing"
    )
