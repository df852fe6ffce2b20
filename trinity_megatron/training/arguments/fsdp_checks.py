"""Sharded parameters (``--use-megatron-fsdp``): what they need, and what they cannot do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host

_FLAG = "--use-megatron-fsdp"
_STRATEGIES = ("optim", "optim_grads", "optim_grads_params")


def check_fsdp(args: argparse.Namespace) -> None:
    """Check a sharded run, and finish the arguments that follow from it.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    args.use_distributed_optimizer = True
    if args.data_parallel_sharding_strategy == "no_shard":  # Megatron's default
        args.data_parallel_sharding_strategy = "optim_grads_params"
    # Megatron's loop tells it then which micro-batch is the last, whose gradients go to replicas.
    args.overlap_grad_reduce = args.overlap_param_gather = True


@contextmanager
def passing_as_adam(args: argparse.Namespace) -> Iterator[None]:
    """Let Megatron's checks of a sharded run see what they know: AdamW and its own format.

    Both come back after them: Muon is built on the shards, and checkpoints are ``torch_dist``.
    """
    if not args.use_megatron_fsdp:
        yield
        return
    optimizer, ckpt_format = args.optimizer, args.ckpt_format
    args.optimizer, args.ckpt_format = "adam", "fsdp_dtensor"
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if is_cpu_host():  # where it has no effect
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    try:
        yield
    finally:
        if connections is not None:
            os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = connections
    args.optimizer, args.ckpt_format = optimizer, ckpt_format
