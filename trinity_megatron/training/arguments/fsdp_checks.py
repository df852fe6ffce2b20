"""Sharded parameters (``--use-megatron-fsdp``): what they need, and what they cannot do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host
from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import flag_of

_FLAG = "--use-megatron-fsdp"
# What a sharded run does not do: (dest, values that are fine) -> reason and remedy.
_REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("tensor_model_parallel_size", (1, None), "layers are cut over data-parallel ranks instead"),
    ("expert_tensor_parallel_size", (1, None), "experts are cut over data-parallel ranks instead"),
    ("pipeline_model_parallel_size", (1, None), "one stage holds all layers, in shards"),
    ("ckpt_format", ("torch_dist",), "the checkpoints of all runs have one format, torch_dist"),
    ("fp16", (False,), "there is no loss scaling over shards; bf16 needs none"),
    ("optimizer", ("muon", "adam"), "only muon and adam step on shards"),
    ("megatron_fsdp_main_params_dtype", ("fp32",), "masters are kept in fp32"),
    ("fp8_param_gather", (False,), "the masters of FP8 weights are not of its shards"),
    ("use_precision_aware_optimizer", (False,), "the state of a shard is kept in fp32"),
    ("optimizer_cpu_offload", (False,), "the shards of the state are on the device"),
    ("overlap_param_gather_with_optimizer_step", (False,), "weights are gathered layer by layer"),
    ("init_model_with_meta_device", (False,), "shards are drawn where they lie already"),
    ("data_parallel_random_init", (False,), "all ranks draw the same model already"),
    ("cuda_graph_impl", ("none",), "gathered layers come and go, which a graph cannot"),
    ("log_params_norm", (False,), "no rank has the parameters whole"),
    ("check_weight_hash_across_dp_replicas_interval", (None,), "no rank has the parameters whole"),
    ("use_torch_fsdp2", (False,), "there is one way to shard"),
)


def check_fsdp(args: argparse.Namespace) -> None:
    """Check a sharded run, and finish the arguments that follow from it.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    for name, fine, reason in _REFUSED:
        value = getattr(args, name, fine[0])
        if value not in fine:
            given = f"{flag_of(name)} {value}" if not isinstance(value, bool) else flag_of(name)
            raise UserError(
                f"{given} with {_FLAG}: {reason}. Remedy: drop {flag_of(name)}, or {_FLAG}."
            )
    _check_replicas(args)
    args.use_distributed_optimizer = True
    if args.data_parallel_sharding_strategy == "no_shard":  # Megatron's default
        args.data_parallel_sharding_strategy = "optim_grads_params"
    # Megatron's loop tells it then which micro-batch is the last, whose gradients go to replicas.
    args.overlap_grad_reduce = args.overlap_param_gather = True
    if args.megatron_fsdp_main_grads_dtype == "auto" and not args.grad_reduce_in_bf16:
        args.megatron_fsdp_main_grads_dtype = "fp32"  # as without sharding


def _check_replicas(args: argparse.Namespace) -> None:
    """The ranks divide into replicas, and the experts' ranks in each."""
    replicas, ep = args.num_distributed_optimizer_instances, args.expert_model_parallel_size
    ranks = args.world_size
    if ranks % (replicas * ep):
        raise UserError(
            f"--num-distributed-optimizer-instances {replicas}: {ranks} ranks do not divide into "
            f"{replicas} replicas of a multiple of --expert-model-parallel-size {ep} ranks. "
            f"Remedy: start a multiple of {replicas * ep} ranks, or lower one of the two."
        )
    is_default = args.data_parallel_sharding_strategy in ("no_shard", "optim_grads_params")
    if args.outer_dp_sharding_strategy == "optim" and not is_default:
        raise UserError(
            f"--outer-dp-sharding-strategy optim with --data-parallel-sharding-strategy "
            f"{args.data_parallel_sharding_strategy}: Megatron-FSDP shards the state over replicas "
            "only where weights are sharded too. Remedy: drop one of the two."
        )
    if args.outer_dp_sharding_strategy == "optim" and replicas == 1:
        raise UserError(
            "--outer-dp-sharding-strategy optim without replicas. Remedy: add "
            "--num-distributed-optimizer-instances N, or drop the flag."
        )


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
