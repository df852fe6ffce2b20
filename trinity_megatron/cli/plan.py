"""``trinity-megatron plan``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trinity_megatron.model.presets import PRESETS
from trinity_megatron.planner.flags import PARALLEL_SIZES, add_plan_flags
from trinity_megatron.process.rank import quiet_megatron

if TYPE_CHECKING:
    from trinity_megatron.planner.plan import Plan


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "plan",
        help="what a run needs and takes: memory, tokens/s, days",
        description="Memory of the fullest rank of each pipeline stage, time of a step by term, "
        "tokens/s, days and cost of a run on a cluster, by arithmetic and measured kernel rates; "
        "no GPU is needed.  Without parallel flags it searches layouts.  docs/planner.md compares "
        "it with published runs.",
        allow_abbrev=False,
    )
    add_plan_flags(parser)
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: Namespace, others: Sequence[str]) -> int:
    """Print a plan, or the best of a search; return the exit code.

    Raises:
        UserError: A flag is at fault; says how to mend that.
    """
    from trinity_megatron.planner.layout import check_layout
    from trinity_megatron.planner.request import make_plan, report_layout
    from trinity_megatron.planner.search import search_layouts
    from trinity_megatron.planner.text import describe_plan, describe_search

    refuse_packed_documents(args)
    plan = make_plan(args)
    if any(getattr(args, name) is not None for name in PARALLEL_SIZES) or args.use_megatron_fsdp:
        check_layout(plan.model, plan.layout)
        _print(args, plan.as_json() if args.json else describe_plan(plan))
    else:
        search = search_layouts(
            plan,
            micro_batches=args.micro_batch_size and (args.micro_batch_size,),
            recompute=args.recompute_granularity and (args.recompute_granularity,),
        )
        plan = search.best[0]
        beside = report_layout(plan)
        _print(args, plan.as_json() if args.json else describe_search(search, beside))
    return verify(plan) if args.verify else 0


def _print(args: Namespace, result: Any) -> None:
    print(json.dumps(result, indent=1) if args.json else result)


def refuse_packed_documents(args: Namespace) -> None:
    """Documents that the layout cannot cut: the rule of a training.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    if not args.dataloader_inter_document_masking:
        return
    quiet_megatron()  # here, because it imports torch
    from trinity_megatron.training.arguments.layout_checks import check_packed_documents

    preset = PRESETS.get(args.preset)
    balance = preset.model.get("moe_router_load_balancing_type", "none") if preset else "none"
    check_packed_documents(
        Namespace(
            dataloader_inter_document_masking=True,
            tensor_model_parallel_size=args.tensor_model_parallel_size or 1,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size or 1,
            context_parallel_size=args.context_parallel_size or 1,
            transformer_impl=args.transformer_impl or "local",
            micro_batch_size=args.micro_batch_size or 1,
            eval_micro_batch_size=None,
            moe_router_load_balancing_type=balance,
        )
    )


def verify(plan: Plan) -> int:
    """Build ranks and compare, on the standard error; return 1 if they are not as planned."""
    quiet_megatron()
    from trinity_megatron.planner.dry_world import verify_plan

    with contextlib.redirect_stdout(sys.stderr):  # the optimizer's news too
        result = verify_plan(plan)
        print("\n".join(result.lines))
    return int(not result.holds)
