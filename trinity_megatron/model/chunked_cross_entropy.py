"""Vocabulary-parallel cross entropy by torch's own operators, in chunks of tokens.

On a CPU a chunk fits in the cache, so that the logits are read from memory once in each direction.
On a GPU :mod:`.fused_cross_entropy` needs a hundredth of the launches; these chunks remain for
float64 and where there is no Triton.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.utils import get_pg_rank
from torch.autograd.function import once_differentiable

from trinity_megatron.model.logit_statistics import summarize
from trinity_megatron.model.vocab_parallel import all_reduce, claim_gradient

# Bytes of a chunk in the dtype of the computation.  CPU: 1 to 4 MB are equally fast with 32 MB of
# L3 cache, and fewer chunks synchronize the threads less often.  Accelerators: large enough to hide
# kernel launches; not measured.
_CHUNK_BYTES = {"cpu": 4 << 20}
_ACCELERATOR_CHUNK_BYTES = 64 << 20


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss, logsumexp and, if requested, maximum and sum of each token's logits, ``[s, b]``."""

    summarize = staticmethod(summarize)

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        tp_group: torch.distributed.ProcessGroup | None,
        overwrite_logits: bool,
        collect_statistics: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        rows = logits.detach().flatten(0, -2)
        first_column = get_pg_rank(tp_group) * logits.size(-1)
        column, is_here = _locate(target, first_column, logits.size(-1))
        maximum, peak, norm, logit_sum = _reduce_rows(rows, with_sum=collect_statistics)
        local_maximum = maximum.clone()
        all_reduce(maximum, torch.distributed.ReduceOp.MAX, tp_group)
        # Relative to the maximum, so that large logits lose no precision.
        predicted = rows.gather(1, column).squeeze(1) - maximum
        rescale = torch.exp(local_maximum - maximum)
        sums = torch.stack(
            [
                norm / peak * rescale,
                predicted.masked_fill_(~is_here, 0.0),
                *([logit_sum] if logit_sum is not None else []),
            ]
        )
        all_reduce(sums, torch.distributed.ReduceOp.SUM, tp_group)
        log_sum = sums[0].log()
        shape = target.shape
        ctx.save_for_backward(logits, target, rescale / (peak * sums[0]))
        ctx.first_column, ctx.overwrite_logits = first_column, overwrite_logits
        outputs = (log_sum - sums[1]).view(shape), (maximum + log_sum).view(shape)
        if not collect_statistics:
            return *outputs, None, None
        statistics = maximum.view(shape), sums[2].view(shape)
        ctx.mark_non_differentiable(*statistics)
        return *outputs, *statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor, grad_logsumexp: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        grad, logits, target, scale = claim_gradient(ctx)
        column, is_here = _locate(target, ctx.first_column, logits.size(-1))
        grad_loss = grad_loss.reshape(-1, 1).to(scale.dtype)
        grad_logsumexp = grad_logsumexp.reshape(-1, 1).to(scale.dtype)
        _write_gradient(
            grad.flatten(0, -2),
            logits.detach().flatten(0, -2),
            factor=(grad_loss + grad_logsumexp) * scale.unsqueeze(1),
            column=column,
            at_target=grad_loss.neg().masked_fill_(~is_here.unsqueeze(1), 0.0),
        )
        return grad, None, None, None, None


def _reduce_rows(
    rows: torch.Tensor, *, with_sum: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Reduce each row of ``[n, v]`` in one pass over memory.

    torch's softmax is twice as fast as exp and sum, but adds up a row sequentially in fp32: with
    200,000 columns its denominator D is wrong by up to 1e-5.  The largest output is 1 / D.  The sum
    of the outputs, which torch computes pairwise, is the exact denominator divided by D.

    Returns:
        Maximum, 1 / D, exact denominator over D, and the sum of the row or None, each ``[n]``.
    """
    dtype = _compute_dtype(rows)
    maximum, peak, norm, row_sum = torch.empty(4, len(rows), dtype=dtype, device=rows.device)
    for part, chunk, scratch in _chunks(rows):
        maximum[part] = chunk.amax(dim=1)
        if with_sum:
            row_sum[part] = chunk.sum(dim=1, dtype=dtype)
        torch.softmax(chunk, dim=1, dtype=dtype, out=scratch)
        torch.amax(scratch, dim=1, out=peak[part])
        torch.sum(scratch, dim=1, out=norm[part])
    return maximum, peak, norm, row_sum if with_sum else None


def _write_gradient(
    grad: torch.Tensor,
    rows: torch.Tensor,
    *,
    factor: torch.Tensor,
    column: torch.Tensor,
    at_target: torch.Tensor,
) -> None:
    """Write ``softmax(rows) * factor``, plus ``at_target`` in ``column``, rounded once.

    Args:
        grad: Output, ``[n, v]``; may be ``rows``.
        rows: ``[n, v]``.
        factor: ``[n, 1]``.
        column: int64 ``[n, 1]``.
        at_target: ``[n, 1]``.
    """
    for part, chunk, scratch in _chunks(rows):
        torch.softmax(chunk, dim=1, dtype=scratch.dtype, out=scratch)
        result = grad[part] if grad.dtype == scratch.dtype else scratch
        torch.mul(scratch, factor[part], out=result)
        result.scatter_add_(1, column[part], at_target[part])
        if result is scratch:
            grad[part] = scratch


def _chunks(rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Split ``[n, v]`` into chunks of rows that fit in the cache.

    Yields:
        Slice of the rows, the chunk, and a buffer of its shape in the dtype of the computation.
    """
    dtype = _compute_dtype(rows)
    # CPU threads divide the rows of a softmax, so a chunk has the same number for each thread.
    threads = torch.get_num_threads() if rows.device.type == "cpu" else 1
    size = _CHUNK_BYTES.get(rows.device.type, _ACCELERATOR_CHUNK_BYTES)
    num_rows = size // (rows.size(1) * dtype.itemsize) // threads * threads
    num_rows = max(1, min(len(rows), max(threads, num_rows)))
    scratch = torch.empty(num_rows, rows.size(1), dtype=dtype, device=rows.device)
    for start in range(0, len(rows), num_rows):
        part = slice(start, start + num_rows)
        chunk = rows[part]
        yield part, chunk, scratch[: len(chunk)]


def _locate(
    target: torch.Tensor, first_column: int, num_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in this slice, ``[n, 1]``, and whether it is in this slice, ``[n]``."""
    column = target.reshape(-1) - first_column
    is_here = (column >= 0) & (column < num_columns)
    return column.clamp_(0, num_columns - 1).unsqueeze(1), is_here


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
