"""What the features that protect a run add to a step of the tiny recipe: paired steps.

    python tests/performance_tests/bench_protection.py [--blocks 12] [--report FILE]

Three trainings of two ranks each, the recipe of ``examples/trinity_tiny``, in processes of their
own: without what protects a run, with everything, and with ``--log-straggler`` alone.  They take
turns step by step, and while one takes a step the others wait, so that a slow moment of the machine
hits all of them.  A block is as many steps as there are between two logging steps: it holds one
comparison of the ranks' work and one of the replicas (with ``--check-replicas 5``; the recipes have
500).  The figure is the median over the blocks of the ratio, in seconds and in processor seconds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RANKS, INTERVAL, WARM_UP = 2, 5, 5
RECIPE = (
    "--preset tiny --expert-model-parallel-size 2 --micro-batch-size 4 --save-interval 100000 "
    f"--eval-iters 0 --log-interval {INTERVAL}"
).split()
# Name and flags; what has no flag is left out where there are none (see `unprotected`).
CONTENDERS = {
    "off": [],
    "everything": (
        "--skip-spikes 6 --rewind-on-spike --on-damage previous --keep-last 3 --log-straggler "
        f"--async-save --check-replicas {INTERVAL}"
    ).split(),
    "--log-straggler": ["--log-straggler"],
}
_UNFLAGGED = ("FiniteCheck", "GradientCheck", "HangWatchdog", "HeartbeatWriter", "SaveErrors")
# What a step calls of them and of those that have flags, whose time is added up too.
_FLAGGED = ("ReplicaCheck", "SpikeSkipping", "Straggler")
_HOOKS = (
    "on_train_step_start",
    "on_train_step_end",
    "on_checkpoint_finalize_end",
    "begin",
    "should_skip",
    "report",
)


@dataclass(frozen=True)
class Turns:
    """Whose turn it is; every process of every contender has one.

    Attributes:
        mine: Number of this process's contender.
        count: Number of steps of each.
        barrier: Of all processes.
    """

    mine: int
    count: int
    barrier: Any

    def order(self) -> Iterator[int]:
        """Contenders in the order of their turns, which changes from step to step."""
        names = list(range(len(CONTENDERS)))
        for step in range(self.count):
            at = step % len(names)
            turn = names[at:] + names[:at]
            yield from turn if step // len(names) % 2 else reversed(turn)


def taking_turns(turns: Turns, marks: list[tuple[float, float, float]]) -> Any:
    """A callback that waits before each step for the turn of this process.

    Args:
        turns: Of this process.
        marks: Gets the beginning and end of each turn, and the processor seconds at its beginning.
    """
    from trinity_megatron.training.callbacks.callback import Callback

    class Taking(Callback):
        def __init__(self) -> None:
            self._order = turns.order()
            self._began: tuple[float, float] | None = None

        def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
            self._end()
            for owner in self._order:
                if owner == turns.mine:
                    self._began = time.perf_counter(), time.process_time()
                    return
                turns.barrier.wait()

        def _end(self) -> None:
            if self._began is not None:
                begin, cpu = self._began
                marks.append((begin, time.perf_counter(), cpu))
                self._began = None
                turns.barrier.wait()

    return Taking()


def add_up(callback: Any, spent: Counter[str]) -> None:
    """Add up the processor seconds of this thread in the hooks of a callback, by its name."""
    name = type(callback).__name__
    for hook in _HOOKS if name in (*_UNFLAGGED, *_FLAGGED) else ():
        if hasattr(callback, hook):
            setattr(callback, hook, adding(getattr(callback, hook), spent, name))
    if name == "Straggler":  # it looks at the clock before and after each wait for other ranks
        marks = callback._clock._marks
        marks.now = adding(marks.now, spent, "clocks of Straggler")


def adding(hook: Callable[..., Any], spent: Counter[str], name: str) -> Callable[..., Any]:
    """A hook whose processor seconds are added up."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return hook(*args, **kwargs)
        finally:
            spent[name] += time.thread_time() - start

    return wrapper


def prepare(taking: Any, spent: Counter[str], *, is_protected: bool) -> Any:
    """The module of the training's entry, whose loop has the callback.

    Args:
        taking: The callback.
        spent: Gets the processor seconds in the hooks of what protects the run.
        is_protected: Whether to leave in what has no flag.
    """
    from trinity_megatron.process.watchdog import Watchdog
    from trinity_megatron.training import pretrain

    around = pretrain.callbacks_in_training_loop

    def with_turns(callbacks: Sequence[Any]) -> Any:
        kept = [c for c in callbacks if is_protected or type(c).__name__ not in _UNFLAGGED]
        for callback in kept:
            add_up(callback, spent)
        return around([taking, *kept])

    pretrain.callbacks_in_training_loop = with_turns
    if not is_protected:
        Watchdog.start = lambda self: None
    return pretrain


def run_rank(number: int, folder: str, data: str, count: int, barrier: Any) -> None:
    """One process: a rank of one contender."""
    import torch

    torch.set_num_threads(1)
    place, rank = divmod(number, RANKS)
    name = list(CONTENDERS)[place]
    out = Path(folder, str(place))
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({key: str(value) for key, value in values.items()})
    if name == "everything":  # nothing is sent where nothing happens
        os.environ["TRINITY_ALARM_WEBHOOK"] = "http://127.0.0.1:9/"
    if rank or place:
        os.dup2(os.open(f"{folder}/log.{number}", os.O_WRONLY | os.O_CREAT), 1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store.{place}", rank=rank, world_size=RANKS
    )
    marks: list[tuple[float, float, float]] = []
    spent: Counter[str] = Counter()
    sys.argv = ["train", *RECIPE, "--data", data, "--out", str(out), *CONTENDERS[name]]
    sys.argv += ["--train-iters", "100000", "--exit-interval", str(count + 1)]
    taking = taking_turns(Turns(place, count, barrier), marks)
    try:
        prepare(taking, spent, is_protected=name == "everything").main()
    except SystemExit as end:
        assert not end.code, end.code
    Path(folder, f"marks.{place}.{rank}").write_text(json.dumps(marks))
    Path(folder, f"spent.{place}.{rank}").write_text(json.dumps(spent))


def blocks_of(marks: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Seconds and processor seconds of each block.

    A process's own threads may work between its turns too: its processor seconds are those from one
    turn to the next.
    """
    seconds = [end - begin for begin, end, _ in marks]
    cpu = [after[2] - before[2] for before, after in zip(marks, marks[1:], strict=False)]
    starts = range(WARM_UP, len(cpu) - INTERVAL + 1, INTERVAL)
    return [(sum(seconds[at : at + INTERVAL]), sum(cpu[at : at + INTERVAL])) for at in starts]


def measure(
    num_blocks: int, folder: Path, data: Path
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Run the contenders.

    Returns:
        Seconds of each block, and processor seconds of both ranks, for each contender; processor
        seconds of rank 0 in the hooks of what protects a run, in a step.
    """
    import torch

    count = WARM_UP + INTERVAL * num_blocks + 1
    barrier = torch.multiprocessing.get_context("fork").Barrier(RANKS * len(CONTENDERS))
    torch.multiprocessing.start_processes(
        run_rank,
        (str(folder), str(data), count, barrier),
        nprocs=RANKS * len(CONTENDERS),
        start_method="fork",
    )
    found = {}
    for place, name in enumerate(CONTENDERS):
        ranks = [
            blocks_of(json.loads(Path(folder, f"marks.{place}.{rank}").read_text()))
            for rank in range(RANKS)
        ]
        found[name] = [
            (max(s for s, _ in each), sum(c for _, c in each)) for each in zip(*ranks, strict=True)
        ]
    place = list(CONTENDERS).index("everything")
    spent = json.loads(Path(folder, f"spent.{place}.0").read_text())
    return found, {name: seconds / count for name, seconds in spent.items()}


def report(found: dict[str, list[tuple[float, float]]], spent: dict[str, float]) -> str:
    """The figures as a Markdown page."""
    import torch

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    off = found["off"]
    lines = [
        f"# What protection adds to a step, {date.today().isoformat()}",
        "",
        f"Commit {commit}; {platform.machine()}, {os.cpu_count()} cores; torch "
        f"{torch.__version__}; {RANKS} ranks, tiny, {len(off)} blocks of {INTERVAL} steps in turn; "
        f"load average over the last 15 minutes {os.getloadavg()[2]:.1f}.",
        "",
        "Command: `python tests/performance_tests/bench_protection.py`",
        "",
        f"Everything: `{' '.join(CONTENDERS['everything'])}`, the watchdog, the heartbeat, checks "
        "of saves and gradients, and a webhook for alarms.",
        "",
        "| | seconds a step | processor seconds a step | ratio of seconds (quartiles) | ratio of "
        "processor seconds (quartiles) |",
        "|---|---|---|---|---|",
    ]
    for name, blocks in found.items():
        cells = [f"{statistics.median(v) / INTERVAL:.3f}" for v in zip(*blocks, strict=True)]
        for at in (0, 1):
            ratios = [mine[at] / base[at] for mine, base in zip(blocks, off, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Of it in the hooks, on rank 0, in processor milliseconds a step (a comparison of the "
        f"replicas every {INTERVAL} steps and of the ranks' work among them):",
        "",
        "| " + " | ".join(spent) + " |",
        "|---" * len(spent) + "|",
        "| " + " | ".join(f"{seconds * 1e3:.2f}" for seconds in spent.values()) + " |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--data", type=Path, help="prepared; made of the standard library if not")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", WANDB_MODE="disabled")
    os.environ.update(TORCHDYNAMO_DISABLE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    import trinity_megatron.training.pretrain  # noqa: F401  once for all processes
    from tests.functional_tests.worker import import_once
    from trinity_megatron.data.prepare import prepare_data

    import_once()
    with tempfile.TemporaryDirectory() as name:
        data = options.data or Path(name, "data")
        if options.data is None:
            sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))
            prepare_data(data, sources, vocab_size=4096)
        text = report(*measure(options.blocks, Path(name), data.resolve()))
    print(text)
    if options.report:
        options.report.write_text(text)


if __name__ == "__main__":
    # Inside the guard: the helper processes of a save import this file again.
    main()
