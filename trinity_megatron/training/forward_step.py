"""Batch, forward pass and loss of one micro-batch, as Megatron's ``pretrain_gpt.py`` does it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import is_first_or_last_pipeline_stage

from trinity_megatron.training.finish import ValidationTokens

BATCH_KEYS = (
    "attention_mask cu_seqlens cu_seqlens_padded hybrid_cp_group labels local_cp_size loss_mask "
    "max_seqlen position_ids tokens"
).split()


def get_batch(data_iterator: Iterator | None, vp_stage: int | None = None) -> dict[str, Any]:
    """This rank's part of the next micro-batch.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (fp32), each
        ``[b, s / cp]``, and with ``--dataloader-inter-document-masking`` ``cu_seqlens`` (int32).
        Values a pipeline stage does not need are None.
    """
    args = get_args()
    packed = args.dataloader_inter_document_masking
    batch: dict[str, Any] = dict.fromkeys(BATCH_KEYS)
    if not is_first_or_last_pipeline_stage(vp_stage) and not packed:
        return batch
    tp_rank = mpu.get_tensor_model_parallel_rank()
    loaded: dict[str, Any] = {}
    if tp_rank == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        for key in BATCH_KEYS:
            value = sample.get(key)
            loaded[key] = value if value is None else value.cuda(non_blocking=True)
    loaded = get_batch_on_this_tp_rank(
        loaded,
        has_cu_seqlens=packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    loaded = flatten_batch_for_packed_sequences(loaded)
    if is_first_or_last_pipeline_stage(vp_stage):
        loaded = get_batch_on_this_cp_rank(
            loaded,
            is_hybrid_cp=args.hybrid_context_parallel,
            cp_group=mpu.get_context_parallel_group(),
            use_per_sequence_balancing=packed,
        )
    batch.update({key: loaded.get(key) for key in BATCH_KEYS})
    return batch


def get_packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams | None:
    """Document boundaries of a packed micro-batch, or None."""
    if batch["cu_seqlens"] is None:
        return None
    cu_seqlens = batch["cu_seqlens"].squeeze(0)
    padded = batch["cu_seqlens_padded"]
    padded = padded.squeeze(0) if padded is not None else None
    used = padded if padded is not None else cu_seqlens
    max_seqlen = int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=used,
        cu_seqlens_kv=used,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        tokens_per_sample=get_args().seq_length,
    )


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses of one micro-batch.

    Args:
        loss_mask: fp32 ``[b, s]``.
        output_tensor: Cross entropy of each token in nats, ``[b, s]``.

    Returns:
        Summed loss, number of tokens (int32), and both under ``lm loss`` for the log.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    return loss, num_tokens, report


def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    """Run the model on the next micro-batch: Megatron's forward step function."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    ValidationTokens.observe(model, batch["labels"])
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=get_packed_seq_params(batch),
    )
    return output, partial(loss_func, batch["loss_mask"])
