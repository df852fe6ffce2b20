"""orthogonalize() against a plain float64 loop and against the singular value decomposition."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trinity_megatron.optimizer.newton_schulz import (
    COEFFICIENTS,
    coefficient_schedule,
    orthogonalize,
)

# Long (three steps share a Gram matrix), square, tall, vectors, a single number, batches.
SHAPES = [(8, 40), (24, 24), (40, 8), (1, 7), (7, 1), (1, 1), (3, 16, 40), (2, 3, 12, 5)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def plain_newton_schulz(matrix: Tensor, steps: int, coefficients: str) -> Tensor:
    x = matrix / matrix.norm()
    for a, b, c in coefficient_schedule(coefficients, steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("coefficients", "steps"),
    [("dion", 5), ("simple", 1), ("simple", 5), ("polar_express", 7), ("polar_express", 10)],
)
def test_equals_the_plain_loop(shape: tuple[int, ...], coefficients: str, steps: int) -> None:
    matrices = random(*shape)
    expected = torch.stack(
        [plain_newton_schulz(m, steps, coefficients) for m in matrices.reshape(-1, *shape[-2:])]
    ).reshape(shape)

    def run(dtype: torch.dtype) -> Tensor:
        return orthogonalize(matrices.to(dtype), steps=steps, coefficients=coefficients).double()

    torch.testing.assert_close(run(torch.float64), expected, rtol=0, atol=1e-11)
    # float32 rounding, enlarged by the first steps (a product of about 500 for small directions).
    torch.testing.assert_close(run(torch.float32), expected, rtol=0, atol=2e-5)
    # bfloat16 holds 8 bits.
    torch.testing.assert_close(run(torch.bfloat16), expected, rtol=0, atol=0.1)


# --- the singular value decomposition as oracle ---------------------------------------------------

DOCS = Path(__file__).resolve().parents[3] / "docs" / "muon.md"
DTYPES = (torch.float32, torch.bfloat16)


@cache
def documented_bands() -> dict[tuple[str, int], tuple[float, list[tuple[float, float]]]]:
    """Table of docs/muon.md: smallest ``s / ||X||``; bands of float64, float32, bfloat16."""
    bands = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0].strip("`") in COEFFICIENTS:
            values = [tuple(float(v) for v in cell.split(" to ")) for cell in cells[4:]]
            bands[cells[0].strip("`"), int(cells[1])] = float(cells[2]), values
    return bands


SETS = [("simple", 5), ("dion", 5), ("polar_express", 5), ("polar_express", 8)]


def scalar_recursion(values: Tensor, coefficients: str, steps: int) -> Tensor:
    """What the steps make of singular values, in float64."""
    for a, b, c in coefficient_schedule(coefficients, steps):
        values = a * values + b * values**3 + c * values**5
    return values


def with_spectrum(rows: int, columns: int, smallest: float, seed: int) -> Tensor:
    left, _, right = torch.linalg.svd(random(rows, columns, seed=seed), full_matrices=False)
    exponents = torch.linspace(0, math.log10(smallest), min(rows, columns), dtype=torch.float64)
    return (left * 10**exponents) @ right


@cache
def oracle_inputs(seed: int = 0) -> dict[str, Tensor]:
    return {
        "square": random(48, 48, seed=seed),
        "1:4": random(24, 96, seed=seed),
        "4:1": random(96, 24, seed=seed),
        "1x1": random(1, 1, seed=seed),
        "rank 12 of 48": random(48, 12, seed=seed) @ random(12, 48, seed=seed + 100),
        "rank 6 of 24, 1:4": random(24, 6, seed=seed) @ random(6, 96, seed=seed + 100),
        "condition 1e6": with_spectrum(48, 48, 1e-6, seed),
        "condition 1e6, 1:4": with_spectrum(24, 96, 1e-6, seed),
        "condition 1e6, 4:1": with_spectrum(96, 24, 1e-6, seed),
    }


def in_singular_basis(
    matrix: Tensor, dtype: torch.dtype, coefficients: str, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonalize ``matrix``, rounded to ``dtype``, and look at it through its own SVD.

    Returns:
        ``s / ||X||`` of the rounded matrix ``[r]``; ``U^T result V`` ``[r, r]``, diagonal if the
        singular vectors are kept; the result.
    """
    rounded = matrix.to(dtype)
    left, singular, right = torch.linalg.svd(rounded.double(), full_matrices=False)
    result = orthogonalize(rounded, coefficients=coefficients, steps=steps).double()
    return singular / singular.norm(), left.T @ result @ right.T, result


def spectral_norm(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, 2).item()


@pytest.mark.parametrize("name", oracle_inputs())
@pytest.mark.parametrize(("coefficients", "steps"), SETS)
def test_float32_applies_the_recursion_to_every_singular_value(
    coefficients: str, steps: int, name: str
) -> None:
    """Values and vectors at once, the directions of singular value zero included."""
    singular, in_basis, result = in_singular_basis(
        oracle_inputs()[name], torch.float32, coefficients, steps
    )
    expected = scalar_recursion(singular, coefficients, steps)
    # A rounding of X is enlarged by at most the slope at 0, the product of all a: 485 for "simple",
    # 6363 for "polar_express" with 8 steps.  The shared Gram matrix of 1:4 enlarges ten times more.
    slope = math.prod(a for a, _, _ in coefficient_schedule(coefficients, steps))
    tolerance = 16 * 2**-24 * slope
    assert spectral_norm(in_basis - expected.diag()) < tolerance
    # Nothing outside the span of the singular vectors.
    assert abs(result.norm() - in_basis.norm()) < tolerance


@pytest.mark.parametrize("name", oracle_inputs())
@pytest.mark.parametrize(("coefficients", "steps"), SETS)
def test_bfloat16_applies_the_recursion_to_large_singular_values(
    coefficients: str, steps: int, name: str
) -> None:
    """The roundings of the first steps are a matrix of full rank and of 2e-3 of the norm.

    They are enlarged like a singular value of this size.  So a direction of singular value zero
    does not stay at zero as it does in float32; what can be promised is that the large ones are
    right and that none leaves the band upwards.
    """
    singular, in_basis, result = in_singular_basis(
        oracle_inputs()[name], torch.bfloat16, coefficients, steps
    )
    large = singular >= 2e-3
    expected = scalar_recursion(singular[large], coefficients, steps)
    # Six roundings of 2^-9 a step, while |a| + |b| + |c| of the last steps is 7 and more.
    assert spectral_norm(in_basis[large][:, large] - expected.diag()) < 0.1
    _, (_, _, (_, high)) = documented_bands()[coefficients, steps]
    assert spectral_norm(result) < high + 0.03


def measured_band(
    coefficients: str, steps: int, smallest: float, dtype: torch.dtype
) -> tuple[float, float]:
    values = []
    for seed in range(3):
        matrices = list(oracle_inputs(seed).values())
        matrices += [with_spectrum(n, 64, smallest / 2, seed) for n in (64, 16)]
        for matrix in matrices:
            singular, in_basis, _ = in_singular_basis(matrix, dtype, coefficients, steps)
            values.append(in_basis.diagonal()[singular >= smallest])
    return torch.cat(values).min().item(), torch.cat(values).max().item()


@pytest.mark.parametrize(("coefficients", "steps"), SETS)
def test_singular_values_lie_in_the_documented_band(coefficients: str, steps: int) -> None:
    smallest, (exact, *rounded) = documented_bands()[coefficients, steps]
    grid = torch.logspace(math.log10(smallest), 0, 200_001, dtype=torch.float64)
    values = scalar_recursion(grid, coefficients, steps)
    # Three digits are documented.
    assert (values.min().item(), values.max().item()) == pytest.approx(exact, abs=6e-4)
    # In bfloat16 another order of summation moves the extremes.
    for dtype, band, tolerance in zip(DTYPES, rounded, (1e-3, 1e-2), strict=True):
        found = measured_band(coefficients, steps, smallest, dtype)
        assert found == pytest.approx(band, abs=tolerance), dtype


def test_published_claims() -> None:
    """Jordan: singular values about uniform in [0.5, 1.5].  Polar Express: made for [1e-3, 1]."""
    grid = torch.logspace(-3, 0, 100_001, dtype=torch.float64)
    simple = scalar_recursion(grid[grid >= 2e-3], "simple", 5)
    assert 0.5 <= simple.min() and simple.max() <= 1.5
    errors = [
        (scalar_recursion(grid, "polar_express", steps) - 1).abs().max().item()
        for steps in (5, 6, 7, 8)
    ]
    for error, bound in zip(errors, (0.16, 6e-3, 1e-5, 1e-12), strict=True):
        assert error < bound


# --- invariants -----------------------------------------------------------------------------------


def test_rank_deficient_matrix_keeps_full_precision() -> None:
    """The shared Gram matrix squares the singular values; small ones must survive that."""
    low_rank = random(8, 32, 3) @ random(8, 3, 128, seed=1) + 1e-6 * random(8, 32, 128, seed=2)
    difference = orthogonalize(low_rank.float()).double() - orthogonalize(low_rank)
    assert torch.linalg.matrix_norm(difference, 2).max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 8, 40), (4, 8, 8), (4, 40, 8)])
def test_zeros_stay_zeros_and_nan_stays_in_its_matrix(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    matrices = random(*shape).to(dtype)
    expected = orthogonalize(matrices)
    matrices[1] = 0.0
    matrices[2, 0, 0] = float("nan")
    result = orthogonalize(matrices)
    assert result[1].count_nonzero() == 0
    assert result[2].isnan().all()
    torch.testing.assert_close(result[[0, 3]], expected[[0, 3]], rtol=0, atol=0)


def test_empty_and_tiny_inputs() -> None:
    assert orthogonalize(torch.empty(0, 3, 4)).shape == (0, 3, 4)
    assert orthogonalize(torch.empty(3, 0)).shape == (3, 0)
    # Below eps the norm is not divided out: noise of a dead matrix is not blown up to size one.
    assert orthogonalize(torch.full((4, 8), 1e-12)).abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(6, 16, 48), (6, 16, 16), (6, 48, 16), (2, 3, 16, 24)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_batch_equals_loop(shape: tuple[int, ...], dtype: torch.dtype, close: float) -> None:
    matrices = random(*shape).to(dtype)
    loop = [orthogonalize(matrix) for matrix in matrices.flatten(0, -3)]
    torch.testing.assert_close(
        orthogonalize(matrices), torch.stack(loop).reshape(shape), rtol=0, atol=close
    )


@pytest.mark.parametrize("shape", [(24, 64), (32, 32), (64, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equivariance(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """P X Q gives P result Q, for permutations and for rotations; a factor gives nothing."""
    matrix = random(*shape).to(dtype)
    result = orthogonalize(matrix).double()
    # Different orders of summation; in bfloat16 also the rounding of the rotated input.
    close = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]

    def difference(other: Tensor, expected: Tensor) -> float:
        return spectral_norm(orthogonalize(other.to(dtype)).double() - expected)

    rows, columns = (torch.randperm(n, generator=torch.manual_seed(n)) for n in shape)
    assert difference(matrix[rows][:, columns], result[rows][:, columns]) < close
    left, right = (torch.linalg.qr(random(n, n, seed=n)).Q for n in shape)
    assert difference(left @ matrix.double() @ right, left @ result @ right) < close
    assert difference(matrix.mT, result.mT) < close
    for factor in (3e-4, 7.0, 1e5):
        assert difference(factor * matrix.double(), result) < close


@pytest.mark.parametrize("shape", [(5, 16, 40), (5, 16, 16)])
def test_exact_invariances(shape: tuple[int, ...]) -> None:
    matrices = random(*shape).float()
    result = orthogonalize(matrices)
    assert torch.equal(orthogonalize(16.0 * matrices), result)
    assert torch.equal(orthogonalize(-matrices), -result)
    if shape[-1] != shape[-2]:
        assert torch.equal(orthogonalize(matrices.mT.contiguous().mT), result)


def test_views_are_taken_and_nothing_is_modified() -> None:
    fused = random(4, 32, 40).float()
    before = fused.clone()
    for block in (fused[:, :16], fused[:, 16:], fused[:, :16].mT, fused[..., :10]):
        torch.testing.assert_close(
            orthogonalize(block), orthogonalize(block.contiguous()), rtol=0, atol=1e-5
        )
    assert torch.equal(fused, before)


def test_result_has_the_dtype_computed_in() -> None:
    assert orthogonalize(torch.ones(2, 3)).dtype == torch.float32
    assert orthogonalize(torch.ones(2, 3), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert orthogonalize(torch.ones(2, 3).bfloat16(), dtype=torch.float32).dtype == torch.float32


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="choose one of .*'dion'"):
        coefficient_schedule("quintik", 5)
    with pytest.raises(ValueError, match="multiple of 5"):
        coefficient_schedule("dion", 4)
    with pytest.raises(ValueError, match="at least one"):
        coefficient_schedule("simple", 0)
    with pytest.raises(ValueError, match="only matrices"):
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match="float16"):
        orthogonalize(torch.ones(3, 3), dtype=torch.float16)
    with pytest.raises(ValueError, match="only bfloat16"):
        orthogonalize(torch.ones(3, 3), syrk=True)


def test_megatrons_quintic_is_the_dion_sequence() -> None:
    assert coefficient_schedule("quintic", 10) == COEFFICIENTS["dion"] * 2
