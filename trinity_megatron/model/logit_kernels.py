"""Triton kernels that read the logits once for the loss and once for its gradient.

Import this module where it is used, not at the top of another one: it needs Triton, which is not on
every machine.  With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter
on a CPU.

Liger's kernel (``liger_kernel/ops/cross_entropy.py``, 0.8.5) was read and does not fit.  A program
of it needs the whole row, so the vocabulary cannot be split over ranks; losses are rounded to bf16
with bf16 logits; without a reduction the gradient is rounded to bf16 before the gradient of the
loss is multiplied in, into a second tensor of the size of the logits; its z-loss has no mask; the
host waits three times for the device; and there is no sum of the logits.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

# Columns that a program has at once, and its warps: 16 columns for each thread.  Not measured.
BLOCK, NUM_WARPS = 4096, 8
# Tokens of a turn of the one program that summarizes.
TOKENS = 1024
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _reduce_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    maxima,
    denominators,
    targets,
    sums,
    num_columns,
    first_column,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: maximum, sum of exp(x - maximum), logit of the target, sum."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * num_columns
    offsets = tl.arange(0, BLOCK)
    maximum = -float("inf")
    # A sum for each lane: some fifty terms of a long row are added one after the other, the rest
    # pairwise.
    denominator = tl.zeros((BLOCK,), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        inside = offsets < num_columns - start
        x = tl.load(logits + start + offsets, mask=inside, other=-float("inf")).to(tl.float32)
        if WITH_SUM:
            total += tl.where(inside, x, 0.0)
        highest = tl.maximum(maximum, tl.max(x, axis=0))
        # As long as all are -inf: exp(-inf - 0) is 0, and -inf - -inf would be NaN.
        base = tl.where(highest == -float("inf"), 0.0, highest)
        # Subtract first: large logits lose no precision.
        denominator *= tl.exp2((maximum - base) * _LOG2_E)
        denominator += tl.exp2((x - base) * _LOG2_E)
        maximum = highest
    norm = tl.sum(denominator, axis=0)
    # The maximum of the hardware passes over NaN; the sum does not.
    tl.store(maxima + row, tl.where((norm != norm) & (maximum < float("inf")), norm, maximum))
    # Without a finite logit: NaN, as in the chunks.
    norm = tl.where(maximum == -float("inf"), float("nan"), norm)
    tl.store(denominators + row, norm)
    if WITH_SUM:
        tl.store(sums + row, tl.sum(total, axis=0))
    column = tl.load(target + row) - first_column
    is_here = (column >= 0) & (column < num_columns)
    at_target = tl.load(logits + column, mask=is_here, other=float("nan")).to(tl.float32)
    tl.store(targets + row, at_target)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    gradient,
    logits,
    target,
    maxima,
    denominators,
    grad_loss,
    grad_logsumexp,
    num_columns,
    first_column,
    BLOCK: tl.constexpr,
):
    """A block of a row: ``softmax * (grad_loss + grad_logsumexp) - grad_loss * onehot``."""
    blocks = tl.cdiv(num_columns, BLOCK)
    row = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    start = row.to(tl.int64) * num_columns
    x = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
    at_target = tl.load(grad_loss + row)
    factor = (at_target + tl.load(grad_logsumexp + row)) / tl.load(denominators + row)
    values = tl.exp2((x - tl.load(maxima + row)) * _LOG2_E) * factor
    # Before the only rounding: as the softmax tends to 1 the difference would lose its digits.
    values = tl.where(columns == tl.load(target + row) - first_column, values - at_target, values)
    values = values.to(gradient.dtype.element_ty)
    tl.store(gradient + start + columns, values, mask=inside)


@triton.jit
def _summary_kernel(  # type: ignore[no-untyped-def]
    logsumexp,
    maxima,
    sums,
    mask,
    out,
    num_tokens,
    vocab_size,
    HAS_MASK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Count, total and maximum of logits, logsumexp and its square over the unmasked tokens."""
    offsets = tl.arange(0, TOKENS)
    count = tl.zeros((TOKENS,), dtype=tl.int64)
    logit_total = tl.zeros((TOKENS,), dtype=tl.float64)
    total = tl.zeros((TOKENS,), dtype=tl.float64)
    square_total = tl.zeros((TOKENS,), dtype=tl.float64)
    highest_logit = tl.full((TOKENS,), -float("inf"), dtype=tl.float32)
    highest = tl.full((TOKENS,), -float("inf"), dtype=tl.float32)
    highest_square = tl.full((TOKENS,), -float("inf"), dtype=tl.float32)
    for start in range(0, num_tokens, TOKENS):
        tokens = start + offsets
        counts = tokens < num_tokens
        if HAS_MASK:
            counts = counts & (tl.load(mask + tokens, mask=counts, other=0) != 0)
        count += counts.to(tl.int64)
        # Masked loads: what a masked token has may be inf or NaN.
        value = tl.load(logsumexp + tokens, mask=counts, other=0.0)
        total += value.to(tl.float64)
        square_total += (value * value).to(tl.float64)
        logit_total += tl.load(sums + tokens, mask=counts, other=0.0).to(tl.float64)
        least = -float("inf")
        highest = tl.maximum(highest, tl.where(counts, value, least))
        highest_square = tl.maximum(highest_square, tl.where(counts, value * value, least))
        value = tl.load(maxima + tokens, mask=counts, other=least)
        highest_logit = tl.maximum(highest_logit, value)
    num_counted = tl.sum(count, axis=0)
    _store_statistic(out, num_counted * vocab_size, logit_total, highest_logit)
    _store_statistic(out + 3, num_counted, total, highest)
    _store_statistic(out + 6, num_counted, square_total, highest_square)


@triton.jit
def _store_statistic(out, count, totals, maxima):  # type: ignore[no-untyped-def]
    total = tl.sum(totals, axis=0)
    tl.store(out, count.to(tl.float64))
    tl.store(out + 1, total)
    # As above: NaN is in the sum.
    maximum = tl.max(maxima, axis=0).to(tl.float64)
    tl.store(out + 2, tl.where(total != total, total, maximum))


def reduce_rows(
    rows: torch.Tensor, target: torch.Tensor, first_column: int, *, with_sum: bool
) -> torch.Tensor:
    """Reduce each row of a slice of the vocabulary.

    Args:
        rows: Logits ``[n, v]``, contiguous, in fp32, bf16 or fp16.
        target: Index in the whole vocabulary, int64 ``[n]``, contiguous.
        first_column: Index of the first column in the whole vocabulary.
        with_sum: Whether the sum of the logits is needed.

    Returns:
        fp32 ``[4, n]``: maximum; sum of exp(x - maximum); logit of the target, NaN where it is not
        in this slice; sum of the logits (without values if not needed).
    """
    num_rows, num_columns = rows.shape
    out = torch.empty(4, num_rows, dtype=torch.float32, device=rows.device)
    with _on_device_of(rows):
        _reduce_kernel[(num_rows,)](
            rows,
            target,
            *out,
            num_columns,
            first_column,
            WITH_SUM=with_sum,
            BLOCK=_block(num_columns),
            num_warps=NUM_WARPS,
        )
    return out


def write_gradient(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    target: torch.Tensor,
    first_column: int,
    *,
    maximum: torch.Tensor,
    denominator: torch.Tensor,
    grad_loss: torch.Tensor,
    grad_logsumexp: torch.Tensor,
) -> None:
    """Write the gradient of the logits, rounded once.

    Args:
        gradient: Output, contiguous ``[n, v]``; may be ``rows``.
        rows: As in :func:`reduce_rows`; so are ``target`` and ``first_column``.
        target: int64 ``[n]``.
        first_column: Of this slice.
        maximum: Of the whole vocabulary, fp32 ``[n]``, like all that follow.
        denominator: Sum of exp(x - maximum) over the whole vocabulary.
        grad_loss: Gradient of the cross entropy.
        grad_logsumexp: Gradient of the logsumexp.
    """
    num_rows, num_columns = rows.shape
    block = _block(num_columns)
    with _on_device_of(rows):
        _gradient_kernel[(num_rows * triton.cdiv(num_columns, block),)](
            gradient,
            rows,
            target,
            maximum,
            denominator,
            grad_loss,
            grad_logsumexp,
            num_columns,
            first_column,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def summarize_rows(
    logsumexp: torch.Tensor,
    maximum: torch.Tensor,
    logit_sum: torch.Tensor,
    loss_mask: torch.Tensor | None,
    vocab_size: int,
) -> torch.Tensor:
    """Count, total and maximum over the unmasked tokens.

    Args:
        logsumexp: fp32 ``[n]``, contiguous, like the next two.
        maximum: Largest logit.
        logit_sum: Sum of the logits.
        loss_mask: Nonzero or True for the tokens to include, ``[n]``; None for all.
        vocab_size: Number of logits of a token.

    Returns:
        fp64 ``[3, 3]``, rows for logits, logsumexp and its square.  Sums are of fp64.
    """
    out = torch.empty(3, 3, dtype=torch.float64, device=logsumexp.device)
    mask = logsumexp if loss_mask is None else loss_mask
    with _on_device_of(logsumexp):
        _summary_kernel[(1,)](
            logsumexp,
            maximum,
            logit_sum,
            mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
            out,
            len(logsumexp),
            vocab_size,
            HAS_MASK=loss_mask is not None,
            TOKENS=TOKENS,
        )
    return out


def _block(num_columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(num_columns))


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    # Triton launches on the current device, whichever holds the tensors.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
