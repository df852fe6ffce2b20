"""What routing statistics, SMEBU and all metrics add to a training step of the tiny preset.

    python tests/performance_tests/bench_routing.py [--steps 120] [--report FILE]

One real training through Megatron's ``pretrain()``, with TensorBoard and W&B (offline), in which
every second step counts its tokens, moves the bias and writes every metric, and the steps between
do nothing of it: a fixed bias and no metrics.  So both are of one process and of the same minutes.
Megatron's own timer gives the time of each step, what is written in it included.  What W&B's
process does beside the training would be in both: its processor time is added to the former in
full.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_MODE", "offline")
for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "0")):
    os.environ.setdefault(name, value)
os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")

from trinity_megatron.training import pretrain  # noqa: E402, I001  enters the host first
from trinity_megatron.data.prepare import prepare_data  # noqa: E402
from trinity_megatron.model.moe import bias_update  # noqa: E402
from trinity_megatron.telemetry.tensorboard_log import RunLog  # noqa: E402
from trinity_megatron.training.callbacks import step_metrics  # noqa: E402

GOAL, WARM_UP = 1.03, 10


def alternate() -> None:
    """Let odd steps neither count, nor move the bias, nor measure anything."""
    updater = bias_update.ExpertBiasUpdater
    collect, is_logging_step = updater.collect, step_metrics.is_logging_step
    state = {"is_on": True}
    wandb_seconds.clear()

    def in_even_steps(iteration: int) -> bool:
        state["is_on"] = iteration % 2 == 0
        wandb_seconds.append(processor_seconds_of("wandb-core"))
        return is_logging_step(iteration)

    def counts_in_even_steps(*args: Any) -> None:
        if state["is_on"]:
            collect(*args)

    step_metrics.is_logging_step = in_even_steps
    updater.collect = counts_in_even_steps


def train(folder: Path, steps: int) -> list[float]:
    """Seconds of each step."""
    prepare_data(folder / "data", [])
    sys.argv = ["bench", "--preset", "tiny", "--data", str(folder / "data")]
    sys.argv += ["--out", str(folder / "run"), "--train-iters", str(steps), "--eval-iters", "0"]
    sys.argv += ["--log-interval", "1", "--tensorboard-log-interval", "2"]
    sys.argv += ["--save-interval", "1000000"]
    alternate()
    pretrain.main()
    return list(RunLog(folder / "run" / "tensorboard").scalars("iteration-time").values())


def report(times: list[float], wandb_processor_seconds: float) -> str:
    """The figures as a Markdown page."""
    steps = range(WARM_UP, len(times) - 1)  # index 0 is step 1
    even = [times[i] for i in steps if i % 2]
    odd = [times[i] for i in steps if not i % 2]
    beside = wandb_processor_seconds / ((len(times) - WARM_UP) / 2)
    # Each logging step against the steps before and after it.
    pairs = [(times[i] + beside) / ((times[i - 1] + times[i + 1]) / 2) for i in steps if i % 2]
    quartiles = statistics.quantiles(pairs, n=4)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    lines = [
        f"# Cost of routing statistics, SMEBU and metrics, {date.today().isoformat()}",
        "",
        f"Commit {commit}; {platform.machine()}, {os.cpu_count()} cores, fp32, tiny preset, "
        f"{len(times)} steps of one training.",
        "",
        "Command: `python tests/performance_tests/bench_routing.py`",
        "",
        "| step | median (ms) | min (ms) |",
        "|---|---|---|",
        f"| SMEBU, all metrics | {statistics.median(even) * 1e3:.1f} | {min(even) * 1e3:.1f} |",
        f"| fixed bias, no metrics | {statistics.median(odd) * 1e3:.1f} | {min(odd) * 1e3:.1f} |",
        f"| W&B beside it, for each logged step | {beside * 1e3:.1f} (processor) | |",
        "",
        f"Ratio of a logging step, W&B's processor time added, to its neighbours: median "
        f"**{statistics.median(pairs):.3f}**, quartiles {quartiles[0]:.3f} and "
        f"{quartiles[2]:.3f} (goal <= {GOAL}).",
    ]
    return "\n".join(lines) + "\n"


wandb_seconds: list[float] = []


def processor_seconds_of(name: str) -> float:
    """Processor time so far of this process's children of a name.  Source: proc(5), stat."""
    total = 0.0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, tail = file.read_text().rsplit(")", 1)
        except OSError:
            continue  # it has ended
        fields = tail.split()
        if head.split("(", 1)[1] == name and int(fields[1]) == os.getpid():
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    """Measure and print; write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = train(Path(folder), args.steps)
    text = report(times, wandb_seconds[-1] - wandb_seconds[WARM_UP])
    print(text)
    if args.report:
        args.report.write_text(text)


if __name__ == "__main__":
    main()
