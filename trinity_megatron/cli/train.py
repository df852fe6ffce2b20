"""``trinity-megatron train``."""

import argparse
from collections.abc import Sequence


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
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
        "--data",
        required=True,
        metavar="DIR",
        help="folder that prepare-data made, or MIX.yaml (see trinity-megatron data show)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the run; continued if it has begun"
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks (default: GPUs, or 1)")
    parser.set_defaults(command=run, takes_further_flags=True)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Start the ranks of a training with the flags in ``others``; return their exit code.

    Raises:
        UserError: The data or the number of ranks is at fault.
    """
    from trinity_megatron.launch import local

    return local.train(others, preset=args.preset, data=args.data, out=args.out, nproc=args.nproc)
