"""What routing statistics, SMEBU and all metrics add to a training step of the tiny preset.

    python tests/performance_tests/bench_routing.py [--rounds 5] [--steps 24] [--report FILE]

Real trainings of ``trinity-megatron train`` take turns: one with SMEBU and every metric written in
every step (TensorBoard, W&B offline), one with a fixed bias, no metrics and no W&B.  Megatron's own
timer gives the time of each step, what is written in it included; the figure is the median over the
rounds of the ratio of each round's medians.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trinity_megatron.data.dataset import prepare_data  # noqa: E402
from trinity_megatron.tracking.run_log import RunLog  # noqa: E402

GOAL = 1.03
CONTENDERS = {
    "SMEBU, all metrics": ["--moe-router-bias-update-rule", "smebu"],
    # The step time comes from a writer, so TensorBoard stays; nothing else is written to it.
    "fixed bias, no metrics": [
        *("--moe-router-bias-update-rule", "none", "--tensorboard-log-interval", "1000000"),
        *("--wandb-project", ""),
    ],
}


def step_times(flags: list[str], data: Path, out: Path, steps: int) -> list[float]:
    """Seconds of each step of one training, without the first three."""
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--preset", "tiny"]
    command += ["--data", str(data), "--out", str(out), "--train-iters", str(steps)]
    command += ["--log-interval", "1", "--eval-iters", "0", "--save-interval", "1000000", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return list(RunLog(out / "tensorboard").scalars("iteration-time").values())[3:]


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """Median step time of each contender in every round."""
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_data(data, [])
        for number in range(rounds):
            # Who begins changes from round to round.
            for name in list(CONTENDERS)[:: 1 if number % 2 else -1]:
                out = Path(folder) / f"run{number}{len(times[name])}{name[0]}"
                seconds = step_times(CONTENDERS[name], data, out, steps)
                times[name].append(statistics.median(seconds))
                print(f"round {number + 1}: {name:24s} {times[name][-1] * 1e3:7.1f} ms", flush=True)
    return times


def report(times: dict[str, list[float]], steps: int) -> str:
    """The figures as a Markdown page."""
    ours, peer = CONTENDERS
    ratios = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    lines = [
        f"# Cost of routing statistics, SMEBU and metrics, {date.today().isoformat()}",
        "",
        f"Commit {commit}; {platform.machine()}, {os.cpu_count()} cores, fp32, tiny preset; "
        f"{len(ratios)} rounds in turn, {steps} steps each, medians.",
        "",
        "Command: `python tests/performance_tests/bench_routing.py`",
        "",
        "| contender | median over rounds (ms a step) | min |",
        "|---|---|---|",
        *(
            f"| {name} | {statistics.median(t) * 1e3:.1f} | {min(t) * 1e3:.1f} |"
            for name, t in times.items()
        ),
        "",
        f"Ratio {ours} / {peer}: median **{statistics.median(ratios):.3f}** (goal <= {GOAL}), of "
        f"the fastest rounds {min(times[ours]) / min(times[peer]):.3f}, rounds "
        + ", ".join(f"{ratio:.3f}" for ratio in ratios)
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    text = report(measure(args.rounds, args.steps), args.steps)
    print(text)
    if args.report:
        args.report.write_text(text)


if __name__ == "__main__":
    main()
