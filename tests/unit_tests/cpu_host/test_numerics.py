"""Largest values of tensors, against the plain formula."""

import math

import pytest
import torch

from trinity_megatron.cpu_host.numerics import largest_magnitudes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitudes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(65, 33, generator=generator).to(dtype)
    lowest = torch.full((3,), -torch.finfo(dtype).max, dtype=dtype)
    tensors = [matrix, matrix.t()[1:], matrix[0, 0], lowest]
    for found, tensor in zip(largest_magnitudes(tensors), tensors, strict=True):
        assert found.shape == () and found.dtype == dtype and found.isfinite()
        assert found == max(abs(value) for value in tensor.reshape(-1).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 500, 1000])
def test_one_that_is_no_number(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.ones(1001, dtype=dtype)
    tensor[place] = value
    (found,) = largest_magnitudes([tensor])
    assert math.isnan(found) if math.isnan(value) else found == math.inf
