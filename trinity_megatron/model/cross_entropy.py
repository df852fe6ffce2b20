"""Vocabulary-parallel cross entropy that makes no second tensor of the size of the logits.

The logits are the largest tensor of a training step.  The forward pass reads them once, and
computes at once what z-loss and statistics need; the backward pass reads them once, and writes the
gradient into their storage.  Megatron passes over the logits in memory about ten times, and holds
an fp32 copy of bf16 logits.
"""

import os
from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_pg_size
from torch.utils._triton import has_triton_package

from trinity_megatron.errors import UserError
from trinity_megatron.model.chunked_cross_entropy import ChunkedCrossEntropy
from trinity_megatron.model.logit_statistics import LogitStatistics


class CrossEntropy(NamedTuple):
    """Result of :func:`vocab_parallel_cross_entropy`.

    Attributes:
        loss: Cross entropy in nats, ``[s, b]``.
        logsumexp: Log of the softmax denominator, ``[s, b]``.
        statistics: Statistics of the logits; None unless requested.
    """

    loss: torch.Tensor
    logsumexp: torch.Tensor
    statistics: LogitStatistics | None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    tp_group: torch.distributed.ProcessGroup | None = None,
    overwrite_logits: bool = False,
    collect_statistics: bool = False,
    loss_mask: torch.Tensor | None = None,
) -> CrossEntropy:
    r"""Cross entropy and logsumexp of each token, both differentiable.

    :math:`\mathrm{lse} = \log\sum_i e^{x_i}`, :math:`\mathrm{loss} = \mathrm{lse} - x_{target}`;
    with the softmax p, :math:`\partial x = p (g_{loss} + g_{lse}) - g_{loss} \, onehot`.

    The forward pass takes two all-reduces of a few values per token, the backward pass none.
    Nothing of the size of the logits is made: on a CPU there is one chunk of 4 MB in fp32, on a GPU
    nothing (64 MB in fp64, or without Triton).

    Args:
        logits: This rank's slice of the vocabulary, ``[s, b, v / tp]``, of the same size on each
            rank; copied if not contiguous.  A slice without a finite logit gives NaN.
        target: Index in the whole vocabulary, int64 ``[s, b]``.  As in Megatron, an index out of
            range is treated as a logit that equals the largest and gets no gradient; mask its loss.
        tp_group: Tensor-parallel ranks, which hold the other slices; None for one rank.
        overwrite_logits: Write the gradient into the storage of ``logits`` in the backward pass.
            Ignored for the storage of a leaf.  The backward pass raises a RuntimeError if another
            operation saved the logits, or if it runs a second time.
        collect_statistics: Return statistics; on a CPU it takes one more pass over each chunk.
        loss_mask: Nonzero or True for the tokens to include in the statistics, ``[s, b]``.

    Returns:
        Loss and logsumexp in fp32 (fp64 for fp64 logits), and the statistics.

    Raises:
        UserError: The shape of ``target`` or ``loss_mask`` does not match the logits.
    """
    for name, tensor in (("target", target), ("loss_mask", loss_mask)):
        if tensor is not None and tensor.shape != logits.shape[:-1]:
            raise UserError(
                f"{name} of shape {list(tensor.shape)} does not fit logits of shape "
                f"{list(logits.shape)}. Remedy: one value for each token, "
                f"{list(logits.shape[:-1])} ([s, b], not [b, s])."
            )
    logits = logits.contiguous()
    overwrite_logits = overwrite_logits and not _is_storage_of_leaf(logits)
    implementation = _implementation(logits)
    loss, logsumexp, maximum, logit_sum = implementation.apply(
        logits, target, tp_group, overwrite_logits, collect_statistics
    )
    statistics = None
    if collect_statistics:
        vocab_size = logits.size(-1) * get_pg_size(tp_group)
        statistics = implementation.summarize(
            logsumexp.detach(), maximum, logit_sum, loss_mask, vocab_size
        )
    return CrossEntropy(loss, logsumexp, statistics)


def _implementation(logits: torch.Tensor) -> Any:
    """The autograd function: Triton's kernels on a GPU, chunks of tokens elsewhere.

    Triton's interpreter (TRITON_INTERPRET=1) runs the kernels on a CPU.
    """
    if not (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return ChunkedCrossEntropy
    if logits.dtype == torch.float64 or not has_triton_package():
        return ChunkedCrossEntropy
    # Imported where it is used: Triton is not on every machine.
    from trinity_megatron.model.fused_cross_entropy import FusedCrossEntropy

    return FusedCrossEntropy


def _is_storage_of_leaf(tensor: torch.Tensor) -> bool:
    owner = tensor if tensor._base is None else tensor._base
    return owner.is_leaf
