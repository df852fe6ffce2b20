"""fp32 products on a CPU: another library only where it is faster, and never a rounded factor."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trinity_megatron.cpu_host.matmul import (
    choose_fp32_matmul,
    is_slow_in_mkl,
    multiplies_exactly,
    row_multiple,
)

ROOT = Path(__file__).resolve().parents[3]
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n"
INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\n"


@pytest.mark.parametrize(
    ("cpu_info", "capability", "expected"),
    [
        (AMD, "AVX512", True),
        (AMD, "AVX2", False),  # oneDNN takes the same instructions there
        (INTEL, "AVX512", False),
        ("", "AVX512", False),
        ("", "DEFAULT", False),
    ],
)
def test_where_mkl_is_slow(cpu_info: str, capability: str, expected: bool) -> None:
    assert is_slow_in_mkl(cpu_info, capability) == expected


@pytest.mark.usefixtures("fp32_in_mkl")
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 256, 256), (7, 64, 256), (512, 256, 128), (4096, 256, 96), (256, 4096, 64)],
)
@pytest.mark.parametrize("layout", ["nn", "nt", "tn"])
def test_products_are_as_exact_as_fp32_allows(
    rows: int, inner: int, columns: int, layout: str
) -> None:
    choose_fp32_matmul()
    generator = torch.Generator().manual_seed(rows + inner)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(inner, columns, generator=generator)
    left = left.t().contiguous().t() if layout[0] == "t" else left
    right = right.t().contiguous().t() if layout[1] == "t" else right
    product, exact = left @ right, left.double() @ right.double()
    # Rounding errors of fp32 sums stay below 1e-6 of the sum of magnitudes; factors in bf16 err by
    # more than 1e-5 even at the longest sum.
    scale = left.double().abs() @ right.double().abs()
    assert ((product - exact).abs() <= 1e-6 * scale).all()
    rounded = left.bfloat16().double() @ right.bfloat16().double()
    assert ((rounded - exact).abs() > 1e-5 * scale).any()


def test_a_library_that_rounds_is_found() -> None:
    def multiply_in_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left.bfloat16() @ right.bfloat16()).float()

    def round_factors_to_tf32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        def cut(factor: torch.Tensor) -> torch.Tensor:
            return (factor.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)

        return cut(left) @ cut(right)

    assert multiplies_exactly()
    assert not multiplies_exactly(multiply_in_bf16)
    assert not multiplies_exactly(round_factors_to_tf32)


@pytest.mark.usefixtures("fp32_in_mkl")
def test_the_choice_can_be_asked_for_again() -> None:
    chosen = choose_fp32_matmul()
    assert choose_fp32_matmul() == chosen
    # torch.compile asks for it, and fails where old and new settings of torch are mixed.
    assert torch.get_float32_matmul_precision() == ("medium" if chosen else "highest")


@pytest.mark.usefixtures("fp32_in_mkl")
def test_row_multiple() -> None:
    assert row_multiple(torch.ones(1), 1000) == 1
    assert row_multiple(torch.ones(1).double(), 1000) == 1
    assert row_multiple(torch.ones(1, device="meta").bfloat16(), 1000) == 1  # as a GPU
    torch.set_float32_matmul_precision("medium")
    assert [row_multiple(torch.ones(1), rows) for rows in (1000, 256, 255, 0)] == [32, 32, 1, 1]
    assert row_multiple(torch.ones(1).double(), 1000) == 1


def test_a_process_forked_after_the_choice_can_multiply() -> None:
    """A pool of threads is not there in a forked process: its first product would hang."""
    script = """
import os, torch
from trinity_megatron.cpu_host.matmul import choose_fp32_matmul
torch.set_num_threads(2)
choose_fp32_matmul()
assert torch.get_num_threads() == 2
if os.fork() == 0:
    torch.ones(300, 300) @ torch.ones(300, 300)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "7", result.stderr


@pytest.mark.usefixtures("fp32_in_mkl")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_exactness_is_tried_in_fp32(default: torch.dtype) -> None:
    seen = set()

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.add((left.dtype, right.dtype, left.device.type))
        return left @ right

    torch.set_default_dtype(default)
    try:
        assert multiplies_exactly(multiply)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == {(torch.float32, torch.float32, "cpu")}
