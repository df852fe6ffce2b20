"""Rules between the parallel layout of a run, its ranks and its model."""

from __future__ import annotations

import argparse

from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import ARGUMENT_DEST, flag_of
from trinity_megatron.model.size_rules import check_sizes


def check_layout(args: argparse.Namespace) -> None:
    """Check all rules.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """

    def read(field: str) -> object:
        return getattr(args, ARGUMENT_DEST.get(field, field), None)

    check_sizes(read, lambda field: f"{flag_of(ARGUMENT_DEST.get(field, field))} {read(field)}")
    check_sequence_parallel(args)
    check_sequence_length(args)
    check_packed_documents(args)
    check_world_size(args)
    check_expert_world_size(args)


def check_sequence_parallel(args: argparse.Namespace) -> None:
    """Megatron's MoE layer wants sequence parallelism with tensor parallelism."""
    tp = args.tensor_model_parallel_size
    if tp > 1 and not args.sequence_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {tp} without --sequence-parallel: Megatron's MoE layer "
            "refuses to train so. Remedy: add --sequence-parallel."
        )


def check_sequence_length(args: argparse.Namespace) -> None:
    """Context parallelism cuts a sequence into two equal chunks a rank."""
    cp, length = args.context_parallel_size, args.seq_length
    parts = 2 * cp * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    if cp > 1 and length and length % parts:
        fits = sorted({length // parts * parts or parts, -(-length // parts) * parts})
        raise UserError(
            f"--seq-length {length} with --context-parallel-size {cp}: the ranks need equal parts, "
            f"and {length} is no multiple of {parts}. Remedy: --seq-length "
            f"{' or '.join(map(str, fits))}."
        )


def check_packed_documents(args: argparse.Namespace) -> None:
    """Documents that do not attend to each other, and what cuts a sequence."""
    if not args.dataloader_inter_document_masking:
        return
    tp = args.tensor_model_parallel_size
    cp = args.context_parallel_size
    if cp > 1 and args.transformer_impl == "transformer_engine":
        # Megatron cuts a sequence as a whole, Transformer Engine wants each document cut.
        raise UserError(
            f"--context-parallel-size {cp} with --dataloader-inter-document-masking is not "
            "supported by Transformer Engine's layers. Remedy: --transformer-impl local, or drop "
            "one of the two."
        )
    pp = args.pipeline_model_parallel_size
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        size = getattr(args, name) or 1
        if pp > 1 and size > 1:
            # One row of b * s tokens leaves a stage, and the next one takes s rows of b.
            raise UserError(
                f"{flag_of(name)} {size} with --dataloader-inter-document-masking and "
                f"--pipeline-model-parallel-size {pp} is not supported: Megatron packs the "
                "sequences of a micro-batch into one row, for which the next stage has no place. "
                f"Remedy: {flag_of(name)} 1 (the global batch stays the same)."
            )
        if cp > 1 and size > 1:
            raise UserError(
                f"{flag_of(name)} {size} with --dataloader-inter-document-masking and "
                f"--context-parallel-size {cp} is not supported: Megatron packs the sequences of a "
                "micro-batch into one row and cuts that over the ranks, so that a rank would have "
                f"whole sequences. Remedy: {flag_of(name)} 1 (the global batch stays the same)."
            )
    has_sequence_loss = "seq_aux_loss" in args.moe_router_load_balancing_type
    if tp > 1 and args.micro_batch_size > 1 and has_sequence_loss:
        # Megatron packs the sequences of a micro-batch into one row and cuts that over the ranks.
        raise UserError(
            f"--micro-batch-size {args.micro_batch_size} with --dataloader-inter-document-masking, "
            f"--tensor-model-parallel-size {tp} and the sequence-wise balance loss: the loss would "
            "mix sequences. Remedy: --micro-batch-size 1."
        )


def check_world_size(args: argparse.Namespace) -> None:
    """The ranks are a multiple of one replica of the dense layers."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    size = tp * pp * args.context_parallel_size
    if args.world_size % size:
        raise UserError(
            f"{args.world_size} ranks cannot be divided into --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size "
            f"{args.context_parallel_size} = {size}. Remedy: start a multiple of {size} ranks "
            f"(trinity-megatron train --nproc {size})."
        )


def check_expert_world_size(args: argparse.Namespace) -> None:
    """The ranks are a multiple of one replica of the experts."""
    pp, ep = args.pipeline_model_parallel_size, args.expert_model_parallel_size
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    size = expert_tp * pp * ep
    if args.world_size % size:
        raise UserError(
            f"{args.world_size} ranks cannot be divided into --expert-model-parallel-size {ep} x "
            f"--pipeline-model-parallel-size {pp} x expert tensor parallelism {expert_tp} = "
            f"{size}. Remedy: start a multiple of {size} ranks."
        )
