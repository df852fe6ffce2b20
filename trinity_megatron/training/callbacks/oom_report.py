"""Report of a rank that ran out of memory: bytes by arithmetic, and flags that would help."""

from __future__ import annotations

import argparse

import torch
from megatron.core import parallel_state
from megatron.training import get_args

from trinity_megatron.planner.memory import training_memory
from trinity_megatron.planner.muon_work import even_stages
from trinity_megatron.training.arguments.trinity_config import trinity_config_from_args

# PyTorch has a type of its own for a GPU only.
_ON_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or _ON_CPU in str(error)


def explain(error: RuntimeError) -> str:
    """The error in a line, the figures of this rank, and the flags that lower them."""
    text = str(error)
    what = text[text.index(_ON_CPU) :] if _ON_CPU in text else text
    return f"out of memory: {what.splitlines()[0]} {figures(get_args())}"


def figures(args: argparse.Namespace) -> str:
    """What this rank holds, and the flags that lower it.

    Args:
        args: Of the run, after Megatron's checks.
    """
    stages, tp = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    stage = parallel_state.get_pipeline_model_parallel_rank() if stages > 1 else 0
    held = training_memory(
        trinity_config_from_args(args),
        seq_length=args.seq_length // args.context_parallel_size,
        micro_batch_size=args.micro_batch_size,
        weight_bytes=2 if args.bf16 or args.fp16 else 4,
        optimizer="muon" if args.optimizer == "muon" else "adam",
        layers=even_stages(args.num_layers, stages)[stage],
        expert_parallel=args.expert_model_parallel_size,
    )
    activations = sum(held.activations.values())
    largest = max(held.activations, key=held.activations.__getitem__)
    sharded = args.use_distributed_optimizer
    parts = [
        f"weights {_gb(held.weights)}",
        f"gradients {_gb(held.gradients)}",
        f"optimizer {_gb(held.optimizer)}" + (" in shares over the ranks" if sharded else ""),
        f"activations of a micro-batch {_gb(activations)} (most: {largest})",
    ]
    knobs = [
        f"--micro-batch-size below {args.micro_batch_size}"
        if args.micro_batch_size > 1
        else "a shorter --seq-length or --context-parallel-size",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "more --expert-model-parallel-size or --pipeline-model-parallel-size",
    ]
    if not sharded:
        knobs.append("--use-distributed-optimizer")
    divided = f", before division by --tensor-model-parallel-size {tp}" if tp > 1 else ""
    return (
        f"By arithmetic this rank holds {', '.join(parts)}{divided}. Remedy, one or more of: "
        f"{'; '.join(knobs)}."
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
