"""Tolerance and comparison that the tests of the loss share."""

import os

import torch

# Triton's interpreter runs the kernels of a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COEFF = 1e-2  # large, so that the z-loss weighs as much as the cross entropy
# Of the largest entry: some ten roundings of fp32 (6e-8 each).
TOLERANCE = 1e-6


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.abs().max(), f"{error=} of {expected.abs().max()}"
