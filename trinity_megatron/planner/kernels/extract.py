"""Read measured rates out of an installed ``aiconfigurator-core`` (Apache-2.0, NVIDIA).

    python -m trinity_megatron.planner.kernels.extract > trinity_megatron/planner/kernels/rates.json

The package times kernels of three inference engines, each alone, on an otherwise idle GPU.  Taken
is the median of the engines, over a grid of shapes; ``rates.json`` is what this prints on a coarse
grid, and the table of those who have not installed the package.
"""

import importlib.metadata
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from trinity_megatron.planner.hardware import GPUS, Gpu
from trinity_megatron.planner.kernels.rates import GpuRates, RateTable, interpolate

PACKAGE = "aiconfigurator_core"
ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
WIDTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
FINE_WIDTHS = (256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 12288, 16384)
_GROUP_ROWS = (128, 256, 512, 1024, 2048, 4096)
_SEQUENCES = (1024, 2048, 4096, 8192, 16384)
_MESSAGES = tuple(2**power for power in range(16, 30))
_PLAIN_GROUPS = {
    "moe_dtype": ("bfloat16",),
    "distribution": ("balanced",),
    "moe_tp_size": (1,),
    "moe_ep_size": (1,),
    "kernel_source": ("moe_torch_flow", "moe_torch_flow_cutlass"),
}
_CAUSAL_ATTENTION = {
    "window_size": (0,),
    "num_heads": (32, 48, 64),
    "num_key_value_heads": (4, 8),
    "isl": _SEQUENCES,
}
# Engine's name of a type -> ours.  Blocks of 128 values or of a whole tensor: the better of both.
_DTYPES = {"bf16": ("bfloat16",), "fp8": ("fp8", "fp8_block")}
_COLLECTIVES = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}


def find_package() -> Path | None:
    """Folder of the package's tables; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "systems" / "data" if spec and spec.origin else None


def version() -> str:
    """Name and version of the package."""
    return f"aiconfigurator-core {importlib.metadata.version('aiconfigurator-core')}"


def read_gpu(gpu: Gpu, data: Path, widths: tuple[int, ...] = FINE_WIDTHS) -> GpuRates:
    """Rates of a GPU.

    Args:
        gpu: The GPU.
        data: Folder of the package's tables.
        widths: Sides of matrices of the grid.
    """
    folder = data / gpu.tables
    gemm = {}
    for dtype, names in _DTYPES.items():
        gemm[dtype] = _gemm_grid(folder, names, widths)
    return {
        "rows": list(ROWS),
        "widths": list(widths),
        "gemm": gemm,
        "grouped": {"bf16": _grouped_factors(folder, gpu, gemm["bf16"], widths)},
        "attention": {
            ours: {str(size): _attention_rates(folder, size, name) for size in (64, 128)}
            for ours, name in (("bf16", "bfloat16"), ("fp8", "fp8"))
        },
        "links": _link_rates(folder),
    }


def _tables(
    folder: Path, operation: str, file: str, **wanted: Collection[Any]
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the newest table of each engine, as far as they are wanted."""
    for engine in ("sglang", "trtllm", "vllm"):
        found = sorted((folder / operation / engine).glob(f"*/{file}.parquet"))
        if found:
            yield _read_table(found[-1], **wanted)


def _read_table(path: Path, **wanted: Collection[Any]) -> list[dict[str, Any]]:
    """Rows whose columns have one of the wanted values."""
    import pyarrow.parquet

    filters = [(name, "in", set(values)) for name, values in wanted.items()]
    return pyarrow.parquet.read_table(path, filters=filters or None).to_pylist()


def _gemm_grid(
    folder: Path, names: tuple[str, ...], widths: tuple[int, ...]
) -> list[list[list[int]]]:
    """TFLOP/s by rows, output and input width: the median of the engines."""
    rates: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    wanted = {"m": ROWS, "n": widths, "k": widths, "gemm_dtype": names}
    for table in _tables(folder, "gemm", "gemm_perf", **wanted):
        best: dict[tuple[int, int, int], float] = {}
        for row in table:
            key = (row["m"], row["n"], row["k"])
            rate = 2 * row["m"] * row["n"] * row["k"] / row["latency"] / 1e9
            best[key] = max(best.get(key, 0.0), rate)
        for key, rate in best.items():
            rates[key].append(rate)
    return [[[round(median(rates[m, n, k])) for k in widths] for n in widths] for m in ROWS]


def _grouped_factors(
    folder: Path, gpu: Gpu, grid: list[list[list[int]]], widths: tuple[int, ...]
) -> list[list[float]]:
    """[rows of an expert, rate over that of a matrix product with so many rows], bf16, balanced.

    Timed is the whole operation; what permutation and activation move through memory is taken off.
    Experts narrower than 1024 are left out: there the plain product is bound by its few rows.
    """
    factors: dict[int, list[float]] = defaultdict(list)
    for path in sorted((folder / "moe" / "trtllm").glob("*/moe_perf.parquet")):
        for row in _read_table(path, **_PLAIN_GROUPS):
            if row["num_tokens"] < 1024 or row["inter_size"] < 1024:
                continue
            hidden, width = row["hidden_size"], row["inter_size"]
            rows = row["num_tokens"] * row["topk"]
            moved = 2 * (rows * (3 * hidden + 3 * width) + row["num_tokens"] * hidden)
            seconds = row["latency"] / 1e3 - moved / (0.8 * gpu.memory_bandwidth)
            each = rows / row["num_experts"]
            plain = 6 * rows * hidden * width / seconds / 1e12
            first = interpolate(grid, (ROWS, widths, widths), (each, 2 * width, hidden))
            second = interpolate(grid, (ROWS, widths, widths), (each, hidden, width))
            nearest = min(_GROUP_ROWS, key=lambda size: abs(size - each))
            if abs(nearest - each) < 0.26 * nearest:
                factors[nearest].append(plain / (3 / (2 / first + 1 / second)))
    return [[size, round(median(factors[size]), 2)] for size in _GROUP_ROWS if factors[size]]


def _attention_rates(folder: Path, head_size: int, dtype: str) -> list[list[int]]:
    """[tokens of a sequence, TFLOP/s] of causal attention, forward; masked pairs not counted.

    The best of the engines, for Megatron picks a backend for training by its speed.
    """
    rates: dict[int, list[float]] = defaultdict(list)
    wanted = {**_CAUSAL_ATTENTION, "head_dim": (head_size,), "attn_dtype": (dtype,)}
    for table in _tables(folder, "attention", "context_attention_perf", **wanted):
        found: dict[int, list[float]] = defaultdict(list)
        for row in table:
            length, batch = row["isl"], row["batch_size"]
            if batch * length in (8192, 16384):
                pairs = batch * length * (length + 1) / 2
                flops = 4 * pairs * row["num_heads"] * head_size
                found[length].append(flops / row["latency"] / 1e9)
        for length, values in found.items():
            rates[length].append(median(values))
    return [[length, round(max(rates[length]))] for length in _SEQUENCES if rates[length]]


def _link_rates(folder: Path) -> dict[str, list[list[float]]]:
    """[bytes a rank holds of the whole message, GB/s out of a GPU], by collective, in one node."""
    path = sorted((folder / "comm" / "nccl").glob("*/nccl_perf.parquet"))[-1]
    rows = _read_table(path, nccl_dtype=("half",))
    size = max(row["num_gpus"] for row in rows)
    rates: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        name, message = _COLLECTIVES.get(row["op_name"]), 2 * row["message_size"]
        if name and row["num_gpus"] == size and message in _MESSAGES:
            rate = message * (size - 1) / size / row["latency"] / 1e6
            rates[name].append([message, round(rate, 1)])
    return {name: sorted(pairs) for name, pairs in sorted(rates.items())}


def main() -> None:
    """Print the coarse table of all GPUs."""
    data = find_package()
    if data is None:
        sys.exit(f"{PACKAGE} is not installed. Remedy: pip install aiconfigurator-core.")
    table: RateTable = {
        "source": f"aiconfigurator-core {importlib.metadata.version('aiconfigurator-core')} "
        "(Apache-2.0, NVIDIA), median of its engines; see extract.py",
        "gpus": {name: read_gpu(gpu, data, WIDTHS) for name, gpu in GPUS.items()},
    }
    print(json.dumps(table, separators=(",", ":")))


if __name__ == "__main__":
    main()
