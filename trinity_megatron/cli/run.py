"""``trinity-megatron run``."""

import argparse
from collections.abc import Sequence


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "run",
        help="run an unmodified script of Megatron-LM on this machine",
        description="Run a script of Megatron-LM, such as pretrain_gpt.py, as it is, with one rank "
        "per GPU, or on a CPU.  --spec trinity_megatron.layer_specs get_trinity_layer_spec makes "
        "its model a Trinity.  Flags behind the script are the script's.",
        epilog="Several machines: torchrun or srun over -m trinity_megatron.training.script SCRIPT "
        "FLAGS.  Without this command: patches/README.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks (default: GPUs, or 1)")
    parser.add_argument(
        "--allow-upstream-changes",
        action="store_true",
        help="run although the installed Megatron-Core differs in what this package replaces",
    )
    parser.add_argument("script", metavar="SCRIPT", help="path of the script")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="of the script")
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Start the ranks of a script; return their exit code.

    Raises:
        UserError: The script or the number of ranks is at fault.
    """
    from trinity_megatron.launch import local
    from trinity_megatron.training.script import check_script

    check_script(args.script)
    num_devices = local.count_cuda_devices()
    allowed = ["--allow-upstream-changes"] if args.allow_upstream_changes else []
    return local.launch(
        [*allowed, args.script, *args.flags],
        num_ranks=local.choose_num_ranks(args.nproc, num_devices),
        cuda=num_devices > 0,
        module="trinity_megatron.training.script",
    )
