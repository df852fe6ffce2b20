"""Batch, forward pass and loss of one micro-batch, as Megatron's ``pretrain_gpt.py`` does it."""

import itertools
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
    unwrap_model,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import is_first_or_last_pipeline_stage

from trinity_megatron.errors import UserError
from trinity_megatron.model.attention.segments import note_boundaries
from trinity_megatron.model.device_copy import copy_to
from trinity_megatron.telemetry.step_statistics import StepStatistics, statistics_of
from trinity_megatron.training.callbacks.end_of_run import ValidationTokens
from trinity_megatron.training.domain_losses import domains_of, share_corpora, sum_by_domain

BATCH_KEYS = (
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "hybrid_cp_group",
    "labels",
    "local_cp_size",
    "loss_mask",
    "max_seqlen",
    "position_ids",
    "tokens",
)


def get_batch(
    data_iterator: Iterator | None, vp_stage: int | None = None, *, training: bool = True
) -> dict[str, Any]:
    """This rank's part of the next micro-batch.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (fp32), each
        ``[b, s / cp]``, and with ``--dataloader-inter-document-masking`` ``cu_seqlens`` (int32) and
        ``boundaries``, the same as a list.
        Values a pipeline stage does not need are None.  ``dataset_id`` (int64 ``[b]``): the corpus
        of each validation sample of a mixture.  ``padding_mask`` (bool, True for padding):
        see :func:`padding_positions`.

    Raises:
        UserError: A padded training batch with pipeline parallelism.
    """
    args = get_args()
    packed = args.dataloader_inter_document_masking
    batch: dict[str, Any] = dict.fromkeys(BATCH_KEYS)
    if not is_first_or_last_pipeline_stage(vp_stage) and not packed:
        return batch
    tp_rank = mpu.get_tensor_model_parallel_rank()
    tp_size = mpu.get_tensor_model_parallel_world_size()
    loaded: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    sample = None
    if tp_rank == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        for key in BATCH_KEYS:
            value = sample.get(key)
            loaded[key] = value if value is None else value.cuda(non_blocking=True)
        _refuse_padding_in_pipeline(sample, training)
        rows = {key: sample.get(key) for key in _BOUNDARY_KEYS}
    if args.data_mixture and not training:
        batch["dataset_id"] = share_corpora(sample, args.eval_micro_batch_size)
    loaded = get_batch_on_this_tp_rank(
        loaded,
        # A rank alone has nobody to tell, and would wait for the device to count the boundaries.
        has_cu_seqlens=packed and tp_size * args.pipeline_model_parallel_size > 1,
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
    if training and mpu.get_pipeline_model_parallel_world_size() == 1:
        loaded["padding_mask"] = padding_positions(loaded["tokens"], loaded["loss_mask"])
    if packed:
        loaded = _flatten_documents(loaded, rows)
    if is_first_or_last_pipeline_stage(vp_stage):
        boundaries = loaded.pop("boundaries", None)  # a list, which Megatron would cut
        loaded = get_batch_on_this_cp_rank(
            loaded,
            is_hybrid_cp=args.hybrid_context_parallel,
            cp_group=mpu.get_context_parallel_group(),
            use_per_sequence_balancing=packed,
        )
        loaded["boundaries"] = boundaries
    batch.update({key: loaded.get(key) for key in (*BATCH_KEYS, "padding_mask", "boundaries")})
    return batch


_BOUNDARY_KEYS = ("cu_seqlens", "cu_seqlens_padded")


def _flatten_documents(batch: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """One row of all documents of the micro-batch, and their boundaries on the host.

    Megatron would look for the end of each row of boundaries on the device, and wait for it.

    Args:
        batch: Of this tensor-parallel rank.
        rows: Boundaries as the sample has them on the host, ``[b, s + 1]``; empty where another
            rank has read the sample: then this one waits for the device once.
    """
    device = batch["cu_seqlens"].device
    for key in _BOUNDARY_KEYS:
        if batch.get(key) is not None:
            batch[key] = rows[key] if rows else batch[key].cpu()
    batch = flatten_batch_for_packed_sequences(batch)
    for key in _BOUNDARY_KEYS:
        if batch.get(key) is not None:
            batch["boundaries"] = batch[key].flatten().tolist()  # the padded ones, if there are
            batch[key] = copy_to(batch[key], device)
    if batch.get("padding_mask") is not None:
        batch["padding_mask"] = batch["padding_mask"].reshape(1, -1)
    return batch


_STRAY_TOKENS = 8


def padding_positions(tokens: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Where a sequence is filled up: those tokens are routed, but neither counted nor balanced.

    Megatron's datasets pad at the end, with token 0 and without loss.  A token is the label of the
    one before it, so the padding begins one position after the loss has ended.  A masked token
    within the text (``--eod-mask-loss``) is not padding.

    Args:
        tokens: int64 ``[b, s]``.
        loss_mask: fp32 ``[b, s]``.

    Returns:
        Bool ``[b, s]``, True for padding.
    """
    # Positions from which on nothing has a loss.
    ended = loss_mask.flip(1).cumsum(1).flip(1) == 0
    is_empty = ended[:, :1]  # a whole row of padding
    return torch.cat([is_empty, ended[:, :-1]], dim=1) & (tokens == 0)


def _refuse_padding_in_pipeline(sample: dict[str, torch.Tensor], training: bool) -> None:
    """The stages in the middle of a pipeline do not see the batch, so they would count padding."""
    args = get_args()
    if args.pipeline_model_parallel_size == 1 or not training:
        return
    longest = int(padding_positions(sample["tokens"], sample["loss_mask"]).sum(dim=1).max())
    # Two ends of document in a row look like a token of padding: no reason to stop a training.
    if longest > _STRAY_TOKENS:
        raise UserError(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} with a training "
            f"sequence whose last {longest} tokens are padding: they would be counted as load. "
            "Remedy: pack the sequences (prepare-data does), or --pipeline-model-parallel-size 1, "
            "or step over this batch with --iterations-to-skip."
        )


def get_packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams | None:
    """Document boundaries of a packed micro-batch, or None."""
    if batch["cu_seqlens"] is None:
        return None
    cu_seqlens = batch["cu_seqlens"].squeeze(0)
    padded = batch["cu_seqlens_padded"]
    padded = padded.squeeze(0) if padded is not None else None
    used = padded if padded is not None else cu_seqlens
    boundaries = batch["boundaries"]
    max_seqlen = max(end - start for start, end in itertools.pairwise(boundaries))
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=used,
        cu_seqlens_kv=used,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        tokens_per_sample=get_args().seq_length // get_args().context_parallel_size,
    )
    note_boundaries(params, boundaries, boundaries[-1])
    return params


def loss_func(
    loss_mask: torch.Tensor,
    statistics: StepStatistics,
    corpora: torch.Tensor | None,
    output_tensor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses of one micro-batch.

    Args:
        loss_mask: fp32 ``[b, s]``.
        statistics: Collector of the model.
        corpora: The corpus of each validation sample, int64 ``[b]``; None where it does not matter.
        output_tensor: Cross entropy of each token in nats, ``[b, s]``.

    Returns:
        Summed loss, number of tokens (int32), and both under ``lm loss`` for the log; those of
        each corpus and language under a name of their own.
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
    if statistics.is_collecting:
        statistics.observe_micro_batch(loss, num_tokens)
    if statistics.step_loss is not None:
        statistics.step_loss.add(loss, num_tokens)
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    if corpora is not None:
        domains = domains_of(get_args().data_mixture)
        report.update(sum_by_domain(output_tensor.detach(), loss_mask, corpora, domains))
    return loss, num_tokens, report


def forward_step(
    validation: ValidationTokens, data_iterator: Iterator, model: torch.nn.Module
) -> tuple[torch.Tensor, Callable]:
    """Run the model on the next micro-batch: Megatron's forward step function, with one more.

    Args:
        validation: Sees the labels of an evaluation.
        data_iterator: Of the samples.
        model: A chunk of the model.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = get_batch(data_iterator, vp_stage, training=model.training)
    timers("batch-generator").stop()
    validation.observe(model, batch["labels"], batch["loss_mask"])
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=get_packed_seq_params(batch),
        padding_mask=batch.get("padding_mask"),
    )
    statistics = statistics_of(unwrap_model(model).config)
    return output, partial(loss_func, batch["loss_mask"], statistics, batch.get("dataset_id"))
