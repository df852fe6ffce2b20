"""Run the parts of the suite one after the other and write the report.

    trinity-megatron gpu-check [--device cpu] [--parts environment,numerics]

Every part that trains or tests does so in processes of its own: one that dies takes nothing else
with it, and leaves the GPU's memory clean.
"""

import argparse
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from trinity_megatron.doctor import environment, fp8_loss, profiler, report, suites, throughput
from trinity_megatron.doctor.result import Deadline, PartResult, Settings, Status
from trinity_megatron.errors import UserError
from trinity_megatron.launch import local


class Part(NamedTuple):
    """A part: its function, and the seconds it may take on a GPU."""

    check: Callable[[Settings, Deadline], PartResult]
    limit: float


# The limits add up to less than 8 minutes.
PARTS: dict[str, Part] = {
    environment.NAME: Part(environment.check, 20),
    suites.NUMERICS: Part(suites.check_numerics, 90),
    fp8_loss.NAME: Part(fp8_loss.check, 100),
    throughput.NAME: Part(throughput.check, 170),
    profiler.NAME: Part(profiler.check, 40),
    suites.TESTS: Part(suites.check_tests, 55),
}
_CPU_LIMIT = 300.0  # of each part: a busy laptop is slow, and nothing there is timed against it
_COLORS: dict[Status, str] = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def main(flags: Sequence[str] = ()) -> int:
    """Check the device and write the report.

    Args:
        flags: Of the command line.

    Returns:
        Exit status: 0 if no part failed, or if the machine has no CUDA device and ``--device cpu``
        was not given (which is said); else 1.

    Raises:
        UserError: A flag cannot be met.
    """
    args = _parser().parse_args(flags)
    names = _chosen_parts(args.parts)
    local.check_out(str(args.out))
    if args.report is not None and args.report.is_dir():
        raise UserError(f"--report {args.report} is a folder. Remedy: name a file in it.")
    settings = Settings(args.device, args.out.absolute())
    if settings.on_gpu and local.count_cuda_devices() == 0:
        print(
            "gpu-check: torch finds no CUDA device on this machine; nothing was checked.  "
            "gpu-check --device cpu runs the suite in small on the CPU."
        )
        return 0
    results = [_run(name, settings) for name in names]
    path = args.report or report.default_path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["trinity-megatron", "gpu-check", *flags])
    path.write_text(report.render(results, settings, command), encoding="utf-8")
    print(f"Report: {path}")
    return int(any(result.status == "failed" for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trinity-megatron gpu-check",
        description="Check what this machine's GPU computes and how fast, in under 8 minutes: "
        "versions, numerics, FP8 against bf16, throughput, a profile, the functional tests.  One "
        "GPU is used.  Exit code 1 if a part failed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: the same suite in small; what needs CUDA is skipped (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu_check"),
        metavar="DIR",
        help="folder of its data, runs and logs (%(default)s)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="Markdown file to write")
    parser.add_argument(
        "--parts", metavar="A,B", help=f"run some: {','.join(PARTS)} (default: all)"
    )
    return parser


def _chosen_parts(text: str | None) -> list[str]:
    chosen = list(PARTS) if text is None else [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in PARTS:
            raise UserError(
                f"--parts {text}: {name!r} is no part of the suite. Remedy: choose among "
                f"{', '.join(PARTS)}."
            )
    return [name for name in PARTS if name in chosen]


def _run(name: str, settings: Settings) -> PartResult:
    """Run a part with a line of progress; what it did not expect is a failure of this part only."""
    console = Console(highlight=False)
    part = PARTS[name]
    deadline = Deadline(part.limit if settings.on_gpu else _CPU_LIMIT)
    start = time.monotonic()
    with console.status(f"{name} ..."):
        try:
            result = part.check(settings, deadline)
        except Exception as error:  # one part must not hide the others' results
            result = PartResult(name)
            result.fail(f"{type(error).__name__}: {error}")
    result.close()
    result.seconds = time.monotonic() - start
    color = _COLORS[result.status]
    line = f"{name:<12} [{color}]{result.status}[/{color}] {result.seconds:6.1f} s"
    console.print(line, end="  " if result.reason else "\n")
    if result.reason:
        console.print(result.reason, markup=False, soft_wrap=True)
    return result
