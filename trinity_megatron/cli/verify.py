"""``trinity-megatron verify``."""

import argparse
from collections.abc import Sequence

from trinity_megatron.evaluation.verify_flags import add_verify_flags


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "verify",
        help="compare a Megatron checkpoint with a Hugging Face one",
        description="Run transformers and Megatron on the same tokens in fp32 and compare logits, "
        "hidden states and routing.  Exit code 1 beyond the tolerance.",
        allow_abbrev=False,
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks (%(default)s)")
    add_verify_flags(parser)
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Start the ranks of a comparison; return their exit code."""
    from trinity_megatron.launch import local

    num_devices = local.count_cuda_devices()
    ranks = local.choose_num_ranks(args.nproc, num_devices)
    module = "trinity_megatron.evaluation.hf_parity"
    flags = []
    for name, value in vars(args).items():
        if name not in ("nproc", "command", "takes_further_flags") and value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return local.launch(flags, num_ranks=ranks, cuda=num_devices > 0, module=module)
