"""A run that finds no memory says what it holds and what would help."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.launch import environment
from trinity_megatron.launch.local import count_cuda_devices

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(count_cuda_devices() > 0, reason="limits the memory of the host"),
]


def test_it_names_its_figures_and_the_flags(data: Path, tmp_path: Path) -> None:
    # Some 8 GB of activations and logits, where 7 GB of addresses are to be had.
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--data", str(data)]
    command += ["--out", str(tmp_path), "--train-iters", "2"]
    command += ["--global-batch-size", "128", "--micro-batch-size", "128"]
    result = subprocess.run(
        command,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30)),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 1, result.stderr[-3000:]
    message = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    for part in (
        "error: out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate",
        "By arithmetic this rank holds weights 0.0",
        "activations of a micro-batch",
        "--micro-batch-size below 128",
        "--recompute-granularity",
        "--expert-model-parallel-size",
        "--use-distributed-optimizer",
    ):
        assert part in message
    assert "Traceback" not in result.stderr
