"""Newton-Schulz orthogonalization of batches of matrices: pure tensor functions."""

import torch
from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]

# One (a, b, c) for every step X <- a X + b (X X^T) X + c (X X^T)^2 X.  The names are those of
# Megatron's --muon-coefficient-type (Emerging-Optimizers, muon_utils.py), plus "dion".  What each
# set does to the singular values is measured in docs/muon.md.

# Keller Jordan, https://kellerjordan.github.io/posts/muon/: one triple, any number of steps.
_SIMPLE: Coefficients = ((3.4445, -4.7750, 2.0315),)

# Franz Cesista, YouJiacheng and Keller Jordan, https://leloykun.github.io/ponder/muon-opt-coeffs/;
# the numbers of YouJiacheng (https://x.com/YouJiacheng/status/1905861218138804534), as in
# modded-nanogpt, in the Dion repository (newton_schulz_triton.py), whose fork is the likely source
# of Trinity's Muon, and in Emerging-Optimizers' "quintic".
_DION: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Amsel et al., "The Polar Express", arXiv 2505.16932, Algorithm 1, made for singular values from
# 1e-3 to 1: every step but the last is divided by a safety factor of 1.01; the last one repeats.
_POLAR_EXPRESS: Coefficients = (
    *(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    (1.875, -1.25, 0.375),
)

COEFFICIENTS: dict[str, Coefficients] = {
    "simple": _SIMPLE,
    "quintic": _DION,
    "dion": _DION,
    "polar_express": _POLAR_EXPRESS,
}

# Steps between two Gram matrices where the short form is used, see `orthogonalize`.
_MAX_BLOCK = 3

# Compute capability -> smallest short side from which `syrk.symmetric_product` was measured faster
# than torch.bmm (bench_muon.py, "SYRK against matmul").  Empty: no GPU was at hand to measure on.
_SYRK_FROM: dict[tuple[int, int], int] = {}


def coefficient_schedule(coefficients: str, steps: int) -> Coefficients:
    """Return the ``(a, b, c)`` of every step.

    Args:
        coefficients: A name of `COEFFICIENTS`.
        steps: Number of Newton-Schulz steps.

    Returns:
        ``steps`` triples.  "polar_express" takes its first ``steps`` and repeats its last one;
        the others were tuned as a sequence and are taken whole.

    Raises:
        ValueError: The name is unknown, or ``steps`` is not positive or not a multiple of the
            length of a sequence that can only be taken whole.
    """
    if coefficients not in COEFFICIENTS:
        raise ValueError(
            f"coefficients={coefficients!r} is not known; choose one of {sorted(COEFFICIENTS)}"
        )
    if steps < 1:
        raise ValueError(f"steps={steps}: Newton-Schulz needs at least one step")
    known = COEFFICIENTS[coefficients]
    if coefficients == "polar_express":
        return known[:steps] + known[-1:] * (steps - len(known))
    if steps % len(known):
        raise ValueError(
            f"steps={steps} does not fit coefficients={coefficients!r}, a sequence tuned for "
            f"{len(known)} steps; take a multiple of {len(known)}, or 'simple' or 'polar_express'"
        )
    return known * (steps // len(known))


@torch.no_grad()
def orthogonalize(
    matrices: Tensor,
    *,
    steps: int = 5,
    coefficients: str = "dion",
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    syrk: bool | None = None,
) -> Tensor:
    """Approximate ``U V^T`` of the singular value decomposition ``U S V^T`` of every matrix.

    The singular values of the result lie around 1: with the five "dion" steps between 0.85 and 1.15
    for every singular value above 2e-3 of the Frobenius norm, less for smaller ones.  A zero matrix
    gives zeros; a NaN spoils its own matrix and no other.

    The work is done on the short side.  In full precision, for matrices at least twice as long as
    short, up to three steps share one Gram matrix: the step polynomials are composed on the small
    square and multiplied with the long matrix once.  More steps in a block would lose the small
    singular values to rounding; in half precision every step makes its own Gram matrix.

    Args:
        matrices: ``[..., m, n]``, float32, float64 or bfloat16.  Not modified; may be a view.
        steps: Number of Newton-Schulz steps.
        coefficients: A name of `COEFFICIENTS`.
        eps: Smallest Frobenius norm that is divided by.
        dtype: What to compute in: float32, float64 or bfloat16.  By default bfloat16 on CUDA and
            the dtype of ``matrices`` on CPU.
        syrk: Whether the products that are symmetric are made by the Triton kernels of
            `optimizer.syrk`, in bfloat16.  By default where they were measured faster.

    Returns:
        ``[..., m, n]`` in the dtype computed in; for m > n a transposed view.

    Raises:
        ValueError: ``matrices`` has fewer than two dimensions, the dtype is not one of the three,
            or `coefficient_schedule` refuses the steps; or ``syrk`` is asked for in another dtype.

    Source: Keller Jordan et al., https://kellerjordan.github.io/posts/muon/; the composition on
        the Gram matrix with restarts: Dao-AILab, gram-newton-schulz.
    """
    schedule = coefficient_schedule(coefficients, steps)
    if matrices.dim() < 2:
        raise ValueError(f"shape {tuple(matrices.shape)}: only matrices can be orthogonalized")
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else matrices.dtype
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: take float32, float64 or bfloat16")
    if syrk and dtype != torch.bfloat16:
        raise ValueError(f"syrk=True with dtype={dtype}: only bfloat16 takes the Triton kernels")
    if matrices.numel() == 0:
        return matrices.to(dtype)

    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.reshape(-1, *x.shape[-2:]).to(dtype)
    if dtype == torch.bfloat16:
        x = _half_precision(x, schedule, eps, _use_syrk(x) if syrk is None else syrk)
    else:
        x = _full_precision(x, schedule, eps)
    return (x.mT if tall else x).reshape(matrices.shape)


def _half_precision(x: Tensor, schedule: Coefficients, eps: float, syrk: bool) -> Tensor:
    """Take the steps one by one, with the roundings of torch.optim.Muon.

    X is normalized before the first product, and ``a X`` is added by the product itself: an ``a I``
    inside the polynomial would be rounded to 8 bits, which doubles the error of the result.
    """
    # oneDNN has no bfloat16 kernel for transposed operands: 100 x slower.
    x = x.contiguous()
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=eps)
    # Written into what the step before has read: new memory costs page faults on a CPU.
    result = torch.empty_like(x)
    if not syrk:
        gram, polynomial = x.new_empty(2, len(x), x.shape[1], x.shape[1])
    for a, b, c in schedule:
        if syrk:
            from trinity_megatron.optimizer.syrk import symmetric_product, symmetric_square

            polynomial = symmetric_square(symmetric_product(x), alpha=c, beta=b)
        else:
            torch.bmm(x, x.mT, out=gram)
            torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=result)
        x, result = result, x
    return x


def _use_syrk(x: Tensor) -> bool:
    if not x.is_cuda:
        return False
    smallest = _SYRK_FROM.get(torch.cuda.get_device_capability(x.device))
    return smallest is not None and x.shape[-2] >= smallest


def _full_precision(x: Tensor, schedule: Coefficients, eps: float) -> Tensor:
    """Take the steps in blocks that share a Gram matrix, where that saves work."""
    short, long = x.shape[-2:]
    block = _MAX_BLOCK if long >= 2 * short else 1
    # The first block is the short one: its steep polynomials amplify rounding most.
    start, stop = 0, len(schedule) % block or block
    while start < len(schedule):
        gram = torch.bmm(x, x.mT)
        if start == 0:
            # The trace of X X^T is the squared Frobenius norm: no pass over X is needed for it.
            square = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=eps * eps)[:, None, None]
            gram.div_(square)
            polynomial = _compose(gram, schedule[start:stop]).mul_(square.rsqrt())
        else:
            polynomial = _compose(gram, schedule[start:stop])
        x = torch.bmm(polynomial, x)
        start, stop = stop, stop + block
    return x


def _compose(gram: Tensor, schedule: Coefficients) -> Tensor:
    """Return the ``[batch, m, m]`` matrix whose product with X takes all steps of ``schedule``.

    With R = X X^T a step is X <- P X, P = a I + b R + c R^2; the next R is P R P.  Everything is a
    polynomial of the first R, so all factors commute.  ``gram`` is overwritten.
    """
    polynomial, scratch = torch.empty_like(gram), torch.empty_like(gram)
    product: Tensor | None = None
    for step, (a, b, c) in enumerate(schedule):
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        if step + 1 < len(schedule):
            torch.bmm(polynomial, gram, out=scratch)
            torch.bmm(polynomial, scratch, out=gram)
        if product is None:
            product, polynomial = polynomial, torch.empty_like(gram)
        else:
            torch.bmm(product, polynomial, out=scratch)
            product, scratch = scratch, product
    assert product is not None
    return product
