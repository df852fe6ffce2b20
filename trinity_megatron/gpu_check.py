"""``trinity-megatron gpu-check``: does this machine's GPU train Trinity, and how fast?"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def main(flags: Sequence[str] = ()) -> int:
    """Run the functional tests and the tiny preset in bf16 on the GPU and print its figures.

    Args:
        flags: More Megatron flags for the tiny run.

    Returns:
        Exit status: 0 if all passed, or if the machine has no CUDA device (which is said).
    """
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device on this machine; nothing was checked.")
        return 0
    tests = Path(__file__).resolve().parents[1] / "tests" / "functional_tests"
    if tests.is_dir():
        status = subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)]).returncode
        if status:
            return status
    with tempfile.TemporaryDirectory() as folder:
        return _tiny_run(Path(folder), flags)


def _tiny_run(folder: Path, flags: Sequence[str]) -> int:
    import torch

    from trinity_megatron.flops import measured_matmul_rate, training_flops_per_token
    from trinity_megatron.presets import get_preset, trinity_preset
    from trinity_megatron.tracking.run_log import RunLog

    command = [sys.executable, "-m", "trinity_megatron.cli"]
    data, out = folder / "data", folder / "run"
    options = "--bf16 --train-iters 60 --log-interval 10 --log-memory-to-tensorboard".split()
    train = ["train", "--preset", "tiny", "--data", str(data), "--out", str(out), "--nproc", "1"]
    for part in (["prepare-data", "--out", str(data)], [*train, *options, *flags]):
        status = subprocess.run([*command, *part]).returncode
        if status:
            return status
    recipe, log = get_preset("tiny").training, RunLog(out / "tensorboard")
    seconds = min(log.scalars("iteration-time").values())
    tokens = recipe["global_batch_size"] * recipe["seq_length"] / seconds
    flops = training_flops_per_token(trinity_preset("tiny"), recipe["seq_length"])
    peak = max(log.scalars("mem-max-allocated-bytes").values(), default=0.0)
    print(f"gpu-check: {torch.cuda.get_device_name()}, tiny preset in bf16")
    print(f"  tokens/s      {tokens:,.0f}")
    rate = measured_matmul_rate(torch.device("cuda"))
    print(f"  MFU           {flops * tokens / rate:.1%} of the matmul rate")
    print(f"  peak memory   {peak / 2**30:.2f} GiB")
    return 0
