"""``trinity-megatron evaluate`` against ``lm_eval --model hf`` on the export, one after the other.

python tests/performance_tests/bench_evaluate.py --load RUN/checkpoints --hf EXPORT --data TASKS \
    --tasks NAMES [--rounds 3]

Prints the seconds of each command, and the processor's seconds, which a busy machine changes less.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def measure(command: list[str], cwd: Path) -> tuple[float, float]:
    """Seconds by the clock, and of the processor, of a command and its children."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, env=env, cwd=cwd, check=True, capture_output=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run both commands in turn."""
    parser = argparse.ArgumentParser()
    for name in ("load", "hf", "data"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--batch-size", default="8")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    load, hf, data = (path.absolute() for path in (args.load, args.hf, args.data))
    with tempfile.TemporaryDirectory() as out:
        ours = ["trinity_megatron.cli", "evaluate", "--load", str(load), "--tasks", args.tasks]
        ours += ["--data", str(data), "--batch-size", args.batch_size, "--out", out]
        theirs = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={hf}"]
        theirs += ["--tasks", args.tasks, "--include_path", str(data), "--device", "cpu"]
        theirs += ["--batch_size", args.batch_size, "--output_path", f"{out}/theirs"]
        commands = {"trinity-megatron evaluate": ours, "lm_eval --model hf": theirs}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, words in commands.items():
                seconds[name].append(measure([sys.executable, "-m", *words], data))
                print(name, *(f"{value:.1f}" for value in seconds[name][-1]), flush=True)
    for kind, index in (("clock", 0), ("processor", 1)):
        middle = [median(values[index] for values in seconds[name]) for name in commands]
        print(f"{kind}: {middle[0]:.1f} s and {middle[1]:.1f} s, ratio {middle[0] / middle[1]:.2f}")


if __name__ == "__main__":
    main()
