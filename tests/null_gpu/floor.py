"""The computed floor of a step of the Large-width model, by group, as Markdown.

python -m tests.null_gpu.floor [--data DIR] [FLAGS ...]

Starts itself on the null device.  Further flags are those of a training.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_STEPS = 3  # the last one is counted
_ON_DEVICE = "NULL_GPU_LIBRARY"


def main() -> None:
    """Start the training on the device; there, count its last step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    options, flags = parser.parse_known_args()
    if _ON_DEVICE in os.environ:
        count(options.data, flags)
        return
    from tests.null_gpu.build import build

    with tempfile.TemporaryDirectory() as folder:
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.null_gpu.floor", *sys.argv[1:]]
        environment = {**os.environ, **build(Path(folder)), **rank, "WANDB_MODE": "disabled"}
        sys.exit(subprocess.run(command, env=environment).returncode)


def count(data: Path, flags: list[str]) -> None:
    """Train, and print the tables of the last step."""
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.training import training

    from tests.null_gpu.device import NullDevice
    from trinity_megatron.doctor.step_floor import GPUS, StepFloor, floor_table
    from trinity_megatron.doctor.throughput import GPU_MODELS
    from trinity_megatron.planner.flops import mean_attended_keys
    from trinity_megatron.training import pretrain

    model = GPU_MODELS["Large-width"]
    config = model.config()
    device = NullDevice()

    def attended_keys(module: str) -> float:
        layer = int(module.partition("layers.")[2].partition(".")[0]) + 1
        window = None if config.is_global_layer(layer) else config.window_size[0] + 1
        return mean_attended_keys(model.seq_length, window)

    floor = StepFloor(attended_keys, lambda: device.read()["launches"])
    show_kernels(floor)
    step, optimizer_step = training.train_step, ChainedOptimizer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if get_args().curr_iteration + 1 < _STEPS:
            return step(*args, **kwargs)
        with floor:
            return step(*args, **kwargs)

    def marked(self: Any) -> Any:
        floor.in_optimizer = True
        try:
            return optimizer_step(self)
        finally:
            floor.in_optimizer = False

    counted.__wrapped__ = step  # type: ignore[attr-defined]  # the registry knows what it wraps
    marked.__wrapped__ = optimizer_step  # type: ignore[attr-defined]
    training.train_step, ChainedOptimizer.step = counted, marked
    sys.argv = ["floor", *model.command_line(_STEPS), "--data", str(data), "--eval-iters", "0"]
    sys.argv += ["--tensorboard-log-interval", "100", "--log-interval", "100", *flags]
    pretrain.run()
    for gpu in GPUS:
        print(f"\n| {gpu}, {model.tokens:,} tokens | launches | GB | TFLOP | ms | bound by |")
        print("|---|---|---|---|---|---|")
        for row in floor_table(floor.groups, gpu):
            print(f"| {' | '.join(row)} |")


def show_kernels(floor: Any) -> None:
    """Let the floor count the Triton kernels of the loss, which torch does not dispatch."""
    from trinity_megatron.doctor.step_floor import tensors_in
    from trinity_megatron.model import fused_cross_entropy

    def visible(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = tensors_in((args, kwargs))
            return floor.run_kernels(lambda: function(*args, **kwargs), given)

        return wrapper

    for name in ("reduce_rows", "summarize_rows", "write_gradient"):
        setattr(fused_cross_entropy, name, visible(getattr(fused_cross_entropy, name)))


if __name__ == "__main__":
    main()
