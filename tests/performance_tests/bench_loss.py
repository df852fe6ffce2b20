"""Time and memory of the LM-head loss against Megatron's ``vocab_parallel_cross_entropy``.

    python tests/performance_tests/bench_loss.py [--rounds 9] [--threads 1 2] [--report FILE]

Time: forward and backward pass of the loss alone, in one process, the contenders in turn on the
same logits; the figure is the median over the rounds of each round's ratio, of wall-clock and of
processor time (on one thread the latter is hardly moved by other processes).  Memory: output layer,
loss and backward pass, each contender in a process of its own; the highest resident set above what
the process held before.  Ours includes the z-loss.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Read by OpenMP when torch is loaded.  A thread that spins while it waits keeps its core from the
# thread it waits for where another process has the other core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host  # noqa: E402

enter_host()

import torch  # noqa: E402
from megatron.core.tensor_parallel.cross_entropy import (  # noqa: E402
    vocab_parallel_cross_entropy as megatron_cross_entropy,
)

from trinity_megatron.model.cross_entropy import vocab_parallel_cross_entropy  # noqa: E402
from trinity_megatron.model.lm_head_loss import add_z_loss  # noqa: E402

NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 2048, 32768, 16
COEFF = 1e-4
BASELINE = "Megatron, cross entropy alone"
GOAL_OF_TIME, GOAL_OF_MEMORY = 0.8, 1.05
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _ours(*, collect_statistics: bool) -> Loss:
    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        cross_entropy, logsumexp, _ = vocab_parallel_cross_entropy(
            logits,
            target,
            tp_group=torch.distributed.group.WORLD,
            overwrite_logits=True,
            collect_statistics=collect_statistics,
        )
        return add_z_loss(cross_entropy, logsumexp, COEFF)

    return loss


CONTENDERS: dict[str, Loss] = {
    BASELINE: lambda logits, target: megatron_cross_entropy(
        logits, target, tp_group=torch.distributed.group.WORLD
    ),
    "ours, z-loss": _ours(collect_statistics=False),
    "ours, z-loss and statistics": _ours(collect_statistics=True),
}


class _NoLeaf(torch.autograd.Function):
    """A tensor on the same memory that is not a leaf, so that the losses may overwrite it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        alias = torch.empty(0, dtype=tensor.dtype)
        return alias.set_(tensor.untyped_storage(), 0, tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, torch.zeros(())


class Times(NamedTuple):
    """Seconds of each round."""

    wall: list[float]
    processor: list[float]

    def describe(self, baseline: "Times") -> str:
        """Medians in ms, and the medians of the rounds' ratios to the baseline."""
        medians = [f"{statistics.median(seconds) * 1e3:.0f}" for seconds in self]
        ratios = [
            f"{statistics.median(a / b for a, b in zip(mine, other, strict=True)):.2f}"
            for mine, other in zip(self, baseline, strict=True)
        ]
        return " | ".join([*medians, *ratios])


def measure_time(dtype: torch.dtype, threads: int, rounds: int) -> dict[str, Times]:
    """Forward and backward pass of each contender in each round."""
    torch.set_num_threads(threads)
    values = (2 * torch.randn(NUM_TOKENS, 1, VOCAB_SIZE)).to(dtype)
    target = torch.randint(VOCAB_SIZE, (NUM_TOKENS, 1))
    buffer, anchor = torch.empty_like(values), torch.zeros((), requires_grad=True)
    times = {name: Times([], []) for name in CONTENDERS}
    for measured in [False] + [True] * rounds:
        for name, loss in CONTENDERS.items():
            buffer.copy_(values)
            logits = _NoLeaf.apply(buffer, anchor)
            start, start_of_processor = time.perf_counter(), time.process_time()
            loss(logits, target).mean().backward()
            if measured:
                times[name].wall.append(time.perf_counter() - start)
                times[name].processor.append(time.process_time() - start_of_processor)
    return times


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def print_memory(name: str, dtype: torch.dtype) -> None:
    """Bytes of the highest resident set during a step, above that before it."""
    hidden, weight = (
        torch.randn(n, HIDDEN_SIZE, dtype=dtype).requires_grad_() for n in (NUM_TOKENS, VOCAB_SIZE)
    )
    target = torch.randint(VOCAB_SIZE, (NUM_TOKENS, 1))

    def step(n: int) -> None:
        CONTENDERS[name]((hidden[:n] @ weight.T).unsqueeze(1), target[:n]).mean().backward()

    step(8)  # what torch allocates once
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(NUM_TOKENS)
    print(json.dumps(_resident("VmHWM") - before))


def measure_memory(name: str, dtype: str) -> int:
    """:func:`print_memory` in a new process."""
    command = [sys.executable, __file__, "--memory-of", name, "--dtype", dtype]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(result.stdout.splitlines()[-1])


def report(threads: list[int], rounds: int) -> str:
    """Measure everything; the figures as a Markdown page."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    load = os.getloadavg()[0]
    lines = [
        f"# LM-head loss, {date.today().isoformat()}",
        "",
        f"Commit {commit}; {platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the "
        f"start; torch {torch.__version__}; {NUM_TOKENS} tokens x {VOCAB_SIZE} columns; {rounds} "
        "rounds in turn.",
        "",
        "Command: `python tests/performance_tests/bench_loss.py`, OMP_WAIT_POLICY="
        f"{os.environ['OMP_WAIT_POLICY']}",
        "",
        "| forward and backward | dtype | threads | wall (ms) | processor (ms) | ratio of wall "
        f"(goal <= {GOAL_OF_TIME}) | ratio of processor |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        for number in threads:
            times = measure_time(getattr(torch, dtype), number, rounds)
            for name, seconds in times.items():
                lines.append(
                    f"| {name} | {dtype} | {number} | {seconds.describe(times[BASELINE])} |"
                )
    lines += [
        "",
        f"| output layer, loss, backward | dtype | peak (MB) | ratio (goal <= {GOAL_OF_MEMORY}) |",
        "|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        peaks = {name: measure_memory(name, dtype) for name in CONTENDERS}
        lines += [
            f"| {name} | {dtype} | {peak / 1e6:.0f} | {peak / peaks[BASELINE]:.3f} |"
            for name, peak in peaks.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--report", type=Path)
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        if args.memory_of:
            print_memory(args.memory_of, getattr(torch, args.dtype))
        else:
            text = report(args.threads, args.rounds)
            print(text)
            if args.report:
                args.report.write_text(text)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
