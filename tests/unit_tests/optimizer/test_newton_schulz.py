"""orthogonalize() against a plain float64 loop and against the singular value decomposition."""

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


@pytest.mark.parametrize(
    ("coefficients", "steps", "smallest", "low", "high"),
    [
        ("dion", 5, 2e-3, 0.85, 1.15),
        ("simple", 5, 2e-3, 0.68, 1.21),
        ("polar_express", 5, 2e-3, 0.87, 1.13),
        ("polar_express", 8, 1e-3, 0.999, 1.001),
    ],
)
@pytest.mark.parametrize("shape", [(32, 80), (32, 32), (80, 32)])
def test_singular_values_lie_in_a_band_around_one(
    shape: tuple[int, int], coefficients: str, steps: int, smallest: float, low: float, high: float
) -> None:
    left, _, right = torch.linalg.svd(random(*shape), full_matrices=False)
    singular = torch.logspace(0, -5, 32, dtype=torch.float64)
    matrix = left * singular @ right
    result = orthogonalize(matrix.float(), steps=steps, coefficients=coefficients).double()
    in_basis = left.T @ result @ right.T  # diagonal: the singular vectors stay
    values = in_basis.diagonal()
    large = singular / singular.norm() >= smallest
    assert large.sum() >= 8
    assert low <= values[large].min() and values.max() <= high
    torch.testing.assert_close(in_basis, values.diag(), rtol=0, atol=1e-3)


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


@pytest.mark.parametrize("shape", [(6, 16, 48), (6, 16, 16), (6, 48, 16)])
def test_batch_equals_loop(shape: tuple[int, ...]) -> None:
    matrices = random(*shape).float()
    loop = torch.stack([orthogonalize(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), loop, rtol=0, atol=1e-5)


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


def test_megatrons_quintic_is_the_dion_sequence() -> None:
    assert coefficient_schedule("quintic", 10) == COEFFICIENTS["dion"] * 2
