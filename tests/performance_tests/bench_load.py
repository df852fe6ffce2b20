"""What checksums cost when a checkpoint is loaded: Megatron's load with them, without, and its own.

python tests/performance_tests/bench_load.py [--megabytes 512] [--rounds 7] [--folder DIR]

The three ways take turns, with the files in the page cache ("warm") and without ("cold").  Prints
the median of the time and of the processor time of each, and the ratio to Megatron's own.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from trinity_megatron.checkpoint.integrity.guarded_load import guarded_loads  # noqa: E402
from trinity_megatron.checkpoint.page_cache import forget  # noqa: E402

ROWS, COLUMNS = 2048, 1024  # shards of 8 MB
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "Megatron's own": contextlib.nullcontext,
    "without checksums": lambda: guarded_loads(verify_checksums=False),
    "with checksums": guarded_loads,
}


def make_state(megabytes: int, fill: Callable[..., torch.Tensor]) -> dict[str, ShardedTensor]:
    """Shards of 8 MB.  What ``fill`` gives is what a load finds, and writes to."""
    names = [f"w{index}" for index in range(megabytes // 8)]
    return {name: ShardedTensor.from_rank_offsets(name, fill(ROWS, COLUMNS)) for name in names}


def drop_from_cache(folder: Path) -> None:
    """Let the next load read the files from the disk."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            forget(file.fileno())


def measure(folder: Path, megabytes: int, way: str, *, is_cold: bool) -> tuple[float, float]:
    """Seconds and processor seconds of a load."""
    state = make_state(megabytes, torch.zeros)
    if is_cold:
        drop_from_cache(folder)
    start, cpu = time.perf_counter(), time.process_time()
    with WAYS[way]():
        dist_checkpointing.load(state, str(folder))
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    """Save once, load in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to save; a temporary one by default")
    options = parser.parse_args()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name, "iter_0000001")
        folder.mkdir()
        with guarded_loads():
            dist_checkpointing.save(make_state(options.megabytes, torch.randn), str(folder))
        print("| files | load | seconds | ratio | processor seconds | ratio |")
        print("|---|---|---|---|---|---|")
        for is_cold in (False, True):
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for number in range(options.rounds + 1):
                for way, found in times.items():
                    once = measure(folder, options.megabytes, way, is_cold=is_cold)
                    if number:  # the first round warms up
                        found.append(once)
            print_rows("cold" if is_cold else "warm", times)
    torch.distributed.destroy_process_group()


def print_rows(files: str, times: dict[str, list[tuple[float, float]]]) -> None:
    """The medians of each way, and their ratios to those of the first."""
    rows = {
        way: [statistics.median(values) for values in zip(*found, strict=True)]
        for way, found in times.items()
    }
    first = next(iter(rows.values()))
    for way, row in rows.items():
        cells = [
            f"{value:.3f} | {value / base:.2f}" for value, base in zip(row, first, strict=True)
        ]
        print(f"| {files} | {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
