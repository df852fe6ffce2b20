"""``trinity-megatron evaluate``."""

import argparse
from collections.abc import Sequence

from trinity_megatron.evaluation.evaluate_flags import add_evaluate_flags


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "evaluate",
        help="score a checkpoint on benchmarks",
        description="Score the model of a Megatron checkpoint on tasks of lm-evaluation-harness, "
        "without a network.  The scores and their standard errors are printed, and added to the "
        "run: OUT/evaluation/STEP.json, its report, W&B.",
        allow_abbrev=False,
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks (%(default)s)")
    add_evaluate_flags(parser)
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Start the ranks of an evaluation; return their exit code.

    Raises:
        UserError: The package is missing, or a flag is at fault.
    """
    from trinity_megatron.evaluation.task_choice import check_folder, check_package, split_names
    from trinity_megatron.launch import local

    check_package()
    split_names(args.tasks)
    check_folder(args.data)
    num_devices = local.count_cuda_devices()
    ranks = local.choose_num_ranks(args.nproc, num_devices)
    flags: list[str] = []
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("nproc", "command", "takes_further_flags") or value in (None, False):
            continue
        flags += [flag] if value is True else [flag, str(value)]
    module = "trinity_megatron.evaluation.evaluate"
    return local.launch(flags, num_ranks=ranks, cuda=num_devices > 0, module=module)
