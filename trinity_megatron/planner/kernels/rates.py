"""Rates of kernels and collectives by shape, from a table of measurements."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import log2
from typing import Any, TypedDict

from trinity_megatron.planner.hardware import Gpu


class GpuRates(TypedDict):
    """Measurements of a GPU.

    Attributes:
        rows: Rows of a matrix product, first axis of ``gemm``.
        widths: Output and input widths, its second and third axis.
        gemm: TFLOP/s by type (``bf16``, ``fp8``).
        grouped: [rows of an expert, rate over that of one product with so many rows] by type.
        attention: [tokens, TFLOP/s forward] by type and channels of a head.
        links: [bytes, GB/s] by collective, within an NVLink domain.
    """

    rows: list[int]
    widths: list[int]
    gemm: dict[str, list[list[list[int]]]]
    grouped: dict[str, list[list[float]]]
    attention: dict[str, dict[str, list[list[int]]]]
    links: dict[str, list[list[float]]]


class RateTable(TypedDict):
    """Measurements of all GPUs, with their source."""

    source: str
    gpus: dict[str, GpuRates]


class KernelRates:
    """What one GPU reaches, by shape.

    Args:
        gpu: The GPU.
        measured: Its measurements.
        source: Where they come from.
    """

    def __init__(self, gpu: Gpu, measured: GpuRates, source: str) -> None:
        self.gpu = gpu
        self.measured = measured
        self.source = source
        self._axes = (measured["rows"], measured["widths"], measured["widths"])
        self.gemm = lru_cache(maxsize=None)(self._gemm)

    def _gemm(self, rows: float, outputs: float, inputs: float, dtype: str = "bf16") -> float:
        """FLOP/s of ``[rows, inputs] x [inputs, outputs]``."""
        grid = self.measured["gemm"][dtype]
        return 1e12 * interpolate(grid, self._axes, (rows, outputs, inputs))

    def grouped(self, rows: float, outputs: float, inputs: float, dtype: str = "bf16") -> float:
        """FLOP/s of a product for each of many experts.

        Args:
            rows: Of one expert.
            outputs: Width of an output.
            inputs: Width of an input.
            dtype: ``bf16`` or ``fp8``.
        """
        factor = interpolate_pairs(self.measured["grouped"]["bf16"], rows)
        peak = self.gpu.fp8_flops if dtype == "fp8" else self.gpu.bf16_flops
        return min(factor * self.gemm(rows, outputs, inputs, dtype), 0.9 * peak)

    def attention(
        self, seq_length: int, window: int | None, head_size: int, dtype: str = "bf16"
    ) -> float:
        """FLOP/s of the forward products inside causal attention, masked pairs not counted.

        A window works in tiles: half of a tile at each of its ends is computed and masked.  FP8
        is taken where it was measured, and is faster.
        """
        size = "64" if head_size <= 64 else "128"
        pairs = self.measured["attention"]["bf16"][size]
        if dtype == "fp8" and self.measured["attention"]["fp8"][size]:
            rate = self._attention(self.measured["attention"]["fp8"][size], seq_length, window)
            return max(rate, self._attention(pairs, seq_length, window))
        return self._attention(pairs, seq_length, window)

    @staticmethod
    def _attention(pairs: list[list[int]], seq_length: int, window: int | None) -> float:
        if window is None or window >= seq_length:
            return 1e12 * interpolate_pairs(pairs, seq_length)
        return 1e12 * interpolate_pairs(pairs, 2 * window) * window / (window + _TILE)

    def link(self, collective: str, message: float) -> float:
        """Bytes/s out of a GPU within its NVLink domain.

        Args:
            collective: ``all_gather``, ``reduce_scatter`` or ``all_to_all``.
            message: Bytes of the whole message (what a rank has after a gathering).
        """
        return 1e9 * interpolate_pairs(self.measured["links"][collective], message)


# Keys and queries of a tile of FlashAttention; a diagonal through tiles wastes half at both ends.
_TILE = 128


def interpolate(grid: Any, axes: Sequence[Sequence[int]], point: Sequence[float]) -> float:
    """Interpolate a nested table linearly in the logarithms of its axes; flat outside of it.

    Args:
        grid: Nested lists, one level an axis.
        axes: Ascending positions of each axis.
        point: One position an axis.
    """
    if not axes:
        return float(grid)
    axis, position = axes[0], point[0]
    position = min(max(position, axis[0]), axis[-1])
    after = min(bisect_right(axis, position), len(axis) - 1)
    before = after - 1
    share = log2(position / axis[before]) / log2(axis[after] / axis[before])
    low, high = (
        interpolate(grid[index], axes[1:], point[1:]) if weight else 0.0
        for index, weight in ((before, 1 - share), (after, share))
    )
    return low * (1 - share) + high * share


def interpolate_pairs(pairs: Sequence[Sequence[float]], position: float) -> float:
    """Interpolate ``[position, value]`` pairs linearly in the logarithm of the position."""
    positions = [int(pair[0]) for pair in pairs]
    return interpolate([pair[1] for pair in pairs], [positions], [position])
