"""Symmetric products of batches of matrices in Triton: half the arithmetic of a plain product.

Only the blocks on and below the diagonal are computed; each is stored twice, the second time
transposed.  Import this module where it is used, not at the top of another one: it needs Triton,
which is not on every machine.  Without a GPU the kernel runs in Triton's interpreter, if
TRITON_INTERPRET=1 is in the environment before Triton is imported.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """How the kernel divides its work.

    Attributes:
        rows: Rows and columns of a block of the result.
        depth: Columns of X multiplied at once.
        num_warps: Warps that share a block.
        num_stages: Loads in flight.
    """

    rows: int
    depth: int
    num_warps: int
    num_stages: int


# Candidates for bench_muon.py; the first one is used.  Not yet measured on any GPU: the order is
# that of usual tilings of a matrix product of the same block sizes.  None of them spills registers
# on sm_90, sm_100 or sm_103 (tests/null_gpu/test_kernels.py).
TILINGS: dict[torch.dtype, tuple[Tiling, ...]] = {
    torch.bfloat16: (
        Tiling(128, 64, 8, 3),
        Tiling(128, 32, 8, 4),
        Tiling(64, 64, 4, 4),
    ),
    torch.float32: (Tiling(64, 32, 8, 3), Tiling(128, 16, 8, 3), Tiling(32, 32, 4, 3)),
}


@triton.jit
def _syrk_kernel(  # type: ignore[no-untyped-def]
    x,
    addend,
    out,
    size,
    depth,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_cb,
    stride_cm,
    stride_cn,
    alpha,
    beta,
    HAS_ADDEND: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of the lower triangle of ``alpha X X^T + beta C``, and its mirror image."""
    num_rows = tl.cdiv(size, ROWS)
    num_blocks = num_rows * (num_rows + 1) // 2
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    block = tl.program_id(0) % num_blocks
    # Blocks are numbered row by row: (0, 0), (1, 0), (1, 1), (2, 0), ...  The root is of float32;
    # the two corrections make it exact.
    row = ((tl.sqrt(8.0 * block + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > block, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= block, row + 1, row)
    column = block - row * (row + 1) // 2

    rows = row * ROWS + tl.arange(0, ROWS)
    columns = column * ROWS + tl.arange(0, ROWS)
    offsets = tl.arange(0, DEPTH)
    x += batch * stride_xb
    left = x + rows[:, None].to(tl.int64) * stride_xm + offsets[None, :] * stride_xk
    right = x + columns[:, None].to(tl.int64) * stride_xm + offsets[None, :] * stride_xk
    total = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        inside = offsets[None, :] < depth - start
        a = tl.load(left, mask=(rows[:, None] < size) & inside, other=0.0)
        b = tl.load(right, mask=(columns[:, None] < size) & inside, other=0.0)
        if INTERPRETED:  # which multiplies the bit patterns of bfloat16; products are the same
            a, b = a.to(tl.float32), b.to(tl.float32)
        # "ieee": float32 inputs are not rounded to TF32.
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        left += DEPTH * stride_xk
        right += DEPTH * stride_xk

    total *= alpha
    inside = (rows[:, None] < size) & (columns[None, :] < size)
    if HAS_ADDEND:
        addend += batch * stride_cb
        places = rows[:, None].to(tl.int64) * stride_cm + columns[None, :] * stride_cn
        total += beta * tl.load(addend + places, mask=inside, other=0.0).to(tl.float32)
    # A block on the diagonal is stored twice in the same place, so it must be symmetric itself,
    # in whatever order the hardware added up.
    mirrored = tl.trans(total)
    if row == column:
        total = tl.where(rows[:, None] >= columns[None, :], total, mirrored)
        mirrored = tl.trans(total)
    out += batch * size * size
    values = total.to(out.dtype.element_ty)
    tl.store(out + rows[:, None].to(tl.int64) * size + columns[None, :], values, mask=inside)
    values = mirrored.to(out.dtype.element_ty)
    inside = (columns[:, None] < size) & (rows[None, :] < size)
    tl.store(out + columns[:, None].to(tl.int64) * size + rows[None, :], values, mask=inside)


def symmetric_product(matrices: Tensor, *, tiling: Tiling | None = None) -> Tensor:
    """Return ``X X^T`` of every matrix, exactly symmetric.

    Args:
        matrices: ``[..., m, n]``, bfloat16 or float32.  Any strides; only dimensions before the
            last two that cannot be merged into one are copied.
        tiling: How to divide the work; by default the first of `TILINGS`.

    Returns:
        ``[..., m, m]`` of the same dtype, contiguous, accumulated in float32.

    Raises:
        ValueError: ``matrices`` has fewer than two dimensions or another dtype.
    """
    return _launch(matrices, None, 1.0, 0.0, tiling)


def symmetric_square(
    symmetric: Tensor, *, alpha: float, beta: float, tiling: Tiling | None = None
) -> Tensor:
    """Return ``alpha A A + beta A`` of every symmetric matrix A, exactly symmetric.

    A = A^T makes A A the product of `symmetric_product`.

    Args:
        symmetric: ``[..., m, m]``, bfloat16 or float32.  That it is symmetric is not checked.
        alpha: Factor of A A.
        beta: Factor of A.
        tiling: How to divide the work; by default the first of `TILINGS`.

    Returns:
        ``[..., m, m]`` of the same dtype, contiguous, accumulated in float32.

    Raises:
        ValueError: ``symmetric`` is not square or has another dtype.
    """
    if symmetric.dim() < 2 or symmetric.shape[-1] != symmetric.shape[-2]:
        raise ValueError(f"shape {tuple(symmetric.shape)}: a symmetric matrix is square")
    return _launch(symmetric, symmetric, alpha, beta, tiling)


def _launch(
    matrices: Tensor, addend: Tensor | None, alpha: float, beta: float, tiling: Tiling | None
) -> Tensor:
    if matrices.dim() < 2:
        raise ValueError(f"shape {tuple(matrices.shape)}: not a batch of matrices")
    if matrices.dtype not in TILINGS:
        raise ValueError(f"dtype={matrices.dtype}: take bfloat16 or float32")
    size, depth = matrices.shape[-2:]
    if matrices.numel() == 0:
        return matrices.new_zeros(*matrices.shape[:-1], size)
    x = matrices.reshape(-1, size, depth)
    out = x.new_empty(len(x), size, size)
    tiling = tiling or TILINGS[x.dtype][0]
    num_rows = triton.cdiv(size, tiling.rows)
    num_programs = len(x) * num_rows * (num_rows + 1) // 2
    c = x if addend is None else addend.reshape(-1, size, size)
    # Triton launches on the current device, whichever holds the tensors.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _syrk_kernel[(num_programs,)](
            x,
            c,
            out,
            size,
            depth,
            *x.stride(),
            *c.stride(),
            alpha,
            beta,
            HAS_ADDEND=addend is not None,
            ROWS=tiling.rows,
            DEPTH=tiling.depth,
            INTERPRETED=not x.is_cuda,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
    return out.reshape(*matrices.shape[:-1], size)
