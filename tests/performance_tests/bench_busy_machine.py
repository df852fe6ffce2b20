"""Time steps of the tiny preset while other processes keep cores busy, under OpenMP settings.

    python tests/performance_tests/bench_busy_machine.py --data DIR [--rounds 2] [--report FILE]

Every run is a fresh process, because OpenMP reads its settings once.  The settings take turns
within a round, beside none, one and two busy processes; the figure is the median of all steps of a
setting after the first two of each run.
"""

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trinity_megatron.telemetry.tensorboard_log import RunLog  # noqa: E402

SETTINGS: dict[str, dict[str, str]] = {
    "default of libgomp": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=50000": {"GOMP_SPINCOUNT": "50000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_PROC_BIND=true": {"OMP_PROC_BIND": "true"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
STEPS, WARM_UP = 9, 2


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that compute without end."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def step_seconds(data: str, variables: dict[str, str]) -> list[float]:
    """Seconds of the steps of a run after its first ones."""
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_PROC_BIND": "false", **variables}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--data", data]
        command += ["--out", f"{folder}/run", "--train-iters", str(STEPS), "--log-interval", "1"]
        command += ["--eval-iters", "0", "--save-interval", "1000"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        seconds = RunLog(Path(folder, "run", "tensorboard")).scalars("iteration-time")
    return [value for step, value in seconds.items() if step > WARM_UP]


def main() -> None:
    """Measure, print a table and write it to a report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    measured: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for count in options.busy:
            for name in options.settings:
                with busy_processes(count):
                    seconds = step_seconds(options.data, SETTINGS[name])
                measured.setdefault((name, count), []).extend(seconds)
                print(f"{name}, beside {count}: {statistics.median(seconds):.2f} s", flush=True)
    quiet = statistics.median(measured[options.settings[0], options.busy[0]])
    lines = [
        f"# Steps of the tiny preset on a busy machine, {date.today()}",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {options.rounds} rounds of "
        f"{STEPS - WARM_UP} steps; median seconds (ratio to the first cell).",
        "",
        "| setting | " + " | ".join(f"beside {count}" for count in options.busy) + " |",
        "|---" * (len(options.busy) + 1) + "|",
    ]
    for name in options.settings:
        medians = [statistics.median(measured[name, count]) for count in options.busy]
        cells = [f"{value:.2f} ({value / quiet:.2f})" for value in medians]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.report:
        options.report.write_text(text)


if __name__ == "__main__":
    main()
