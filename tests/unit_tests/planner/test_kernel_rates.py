"""Measured rates: interpolation, reading a table, and collectives over several domains."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from trinity_megatron.planner.constants import CONSTANTS
from trinity_megatron.planner.hardware import GPUS, get_gpu
from trinity_megatron.planner.kernels import extract
from trinity_megatron.planner.kernels.rates import interpolate, interpolate_pairs
from trinity_megatron.planner.kernels.tables import load_rates
from trinity_megatron.planner.links import collective_seconds


def test_interpolation_is_linear_in_logarithms() -> None:
    grid, axes = [[1.0, 3.0], [5.0, 7.0]], [[2, 8], [16, 64]]
    assert interpolate(grid, axes, [8, 64]) == 7.0
    assert interpolate(grid, axes, [4, 16]) == pytest.approx(3.0)
    assert interpolate(grid, axes, [4, 32]) == pytest.approx(4.0)
    assert interpolate(grid, axes, [1, 1000]) == 3.0  # flat outside
    assert interpolate_pairs([[1, 10.0], [100, 20.0]], 10) == pytest.approx(15.0)


@pytest.mark.parametrize("name", GPUS)
def test_rates_stay_below_the_peak_and_grow_with_the_rows(name: str) -> None:
    gpu = GPUS[name]
    rates = load_rates(gpu, own=True)
    for dtype, peak in (("bf16", gpu.bf16_flops), ("fp8", gpu.fp8_flops)):
        for width in (1024, 4096, 12288):
            few, many = (rates.gemm(rows, width, 3072, dtype) for rows in (128, 16384))
            assert few < many < peak
    assert rates.attention(8192, None, 128) < gpu.bf16_flops
    assert rates.attention(8192, 2048, 128) < rates.attention(8192, None, 128)
    assert rates.link("all_to_all", 2**28) < gpu.nvlink


def test_large_matrices_are_those_of_the_design() -> None:
    """What was read off the same tables by hand: Large's wide matrices and Nano's narrow ones."""
    b300, h100 = load_rates(get_gpu("B300"), own=True), load_rates(get_gpu("h100-sxm"), own=True)
    assert 0.6 < b300.gemm(8192, 12288, 3072) / 2250e12 < 0.9
    assert 0.7 < h100.gemm(8192, 12288, 3072) / 989e12 < 0.9
    assert 1.2 < b300.gemm(8192, 12288, 3072, "fp8") / b300.gemm(8192, 12288, 3072) < 1.9
    assert b300.gemm(1024, 2048, 1024, "fp8") < 0.8 * b300.gemm(1024, 2048, 1024)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_tables_of_engines_become_their_median(tmp_path: Path) -> None:
    widths = (256, 512)
    for engine, factor in (("sglang", 1.0), ("trtllm", 2.0), ("vllm", 4.0)):
        rows = [
            {"gemm_dtype": dtype, "m": m, "n": n, "k": k, "latency": 2 * m * n * k / factor / 1e9}
            for dtype in ("bfloat16", "fp8")
            for m in extract.ROWS
            for n in widths
            for k in widths
        ]
        write_table(tmp_path / "gemm" / engine / "1.0" / "gemm_perf.parquet", rows)
    grid = extract._gemm_grid(tmp_path, ("bfloat16",), widths)
    assert {rate for plane in grid for line in plane for rate in line} == {2}


def test_tables_that_cannot_be_read_are_said_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / extract.PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    info = tmp_path / f"{extract.PACKAGE}-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aiconfigurator-core\nVersion: 9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_rates.cache_clear()
    rates = load_rates(get_gpu("gb200"))
    load_rates.cache_clear()
    assert rates.source.endswith(")") and "aiconfigurator-core 9 cannot be read" in rates.source
    assert rates.gemm(4096, 4096, 4096) == load_rates(get_gpu("gb200"), own=True).gemm(
        4096, 4096, 4096
    )


def test_collectives_are_bound_by_the_slower_link() -> None:
    rates = load_rates(get_gpu("b300"), own=True)
    message, network = 8 * 2.0**30, CONSTANTS.network * 100e9
    inside = collective_seconds(rates, CONSTANTS, "all_gather", message, 8, 1)
    assert inside == pytest.approx(message * 7 / 8 / rates.link("all_gather", message))
    # One rank of each of 16 nodes: all but its own part comes by its own port.
    across = collective_seconds(rates, CONSTANTS, "all_gather", message, 16, 8)
    assert across == pytest.approx(message * 15 / 16 / network)
    # All ranks of 16 nodes: eight ports share what crosses.
    whole = collective_seconds(rates, CONSTANTS, "all_gather", message, 128, 1)
    assert whole == pytest.approx(max(message * 15 / 16 / 8 / network, inside))
    # Rows cross on their own: nobody shares them.
    rows = collective_seconds(rates, CONSTANTS, "all_to_all", message, 32, 1)
    assert rows == pytest.approx(message * 3 / 4 / network)
    assert collective_seconds(rates, CONSTANTS, "all_gather", message, 1, 1) == 0
