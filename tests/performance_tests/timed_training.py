"""A training that writes down how long its start, its saves and its steps take.

    python tests/performance_tests/timed_training.py TIMES.json FLAGS...

The file has a list of ``{"part", "begin", "seconds", "cpu"}``: Unix time, duration, and seconds of
processor of this process meanwhile (``save until complete``: of its children too).  Parts hold each
other: ``save`` is all that the training waits for in a synchronous save, ``checks`` and
``checksums`` are in it.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_records: list[dict[str, Any]] = []
_TICKS = os.sysconf("SC_CLK_TCK")


def children_cpu(pid: int | str = "self") -> float:
    """Seconds of processor of all living descendants of a process."""
    total = 0.0
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / _TICKS + children_cpu(child)
            except OSError:  # it has ended
                continue
    return total


def note(part: str, begin: float, cpu: float, *, has_children: bool = False) -> None:
    """Write down a part that ends now; times are of its beginning."""
    seconds, own = time.time() - begin, time.process_time()
    if has_children:
        own += children_cpu()
    _records.append({"part": part, "begin": begin, "seconds": seconds, "cpu": own - cpu})


def timed(owner: Any, name: str, part: str) -> None:
    """Time every call of a function or method, for as long as this process lives."""
    before: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(before)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begin, cpu = time.time(), time.process_time()
        try:
            return before(*args, **kwargs)
        finally:
            note(part, begin, cpu)

    setattr(owner, name, wrapper)


def time_parts(spawned: float) -> Any:
    """Time the parts of the training; returns the module of its entry.

    Args:
        spawned: When this process was started, Unix time.
    """
    from trinity_megatron.training import pretrain

    note("imports", spawned, 0.0)
    from megatron.training import training
    from megatron.training.async_utils import is_empty_async_queue

    from trinity_megatron.checkpoint.integrity import guarded_load, metadata
    from trinity_megatron.training.callbacks.callback import Callback

    class Clock(Callback):
        """Starts of steps, and the end of each save in the background."""

        def __init__(self) -> None:
            self._saving: tuple[float, float] | None = None
            self._step: tuple[float, float] | None = None

        def on_train_start(self) -> None:
            note("start-up", spawned, 0.0)

        def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
            self._step = time.time(), time.process_time()

        def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, _: Any) -> None:
            assert self._step is not None
            note("step beside a save" if self._saving else "step", *self._step)

        def on_checkpoint_save_start(self, *args: Any, **kwargs: Any) -> None:
            self._saving = time.time(), time.process_time() + children_cpu()

        def on_checkpoint_save_end(self, iteration: int) -> None:
            self.on_checkpoint_finalize_end()

        def on_checkpoint_finalize_end(self) -> None:
            if self._saving is not None and is_empty_async_queue():
                note("save until complete", *self._saving, has_children=True)
                self._saving = None

    around = pretrain.callbacks_in_training_loop

    @contextmanager
    def with_clock(callbacks: Any) -> Iterator[None]:
        with around([Clock(), *callbacks]):
            timed(training, "maybe_finalize_async_save", "finalize")
            yield

    pretrain.callbacks_in_training_loop = with_clock
    pretrain.finish_run = lambda *args, **kwargs: None  # no report, no text of the model
    timed(training, "save_checkpoint_and_time", "save")
    timed(training, "load_checkpoint", "load")
    timed(guarded_load, "add_checksums", "checksums")
    timed(metadata, "seal", "checksums")
    timed(pretrain.FiniteCheck, "on_checkpoint_save_start", "checks")
    timed(pretrain.ReplicaCheck, "on_checkpoint_save_start", "checks")
    return pretrain


def main() -> None:
    """Train with the flags; write the times."""
    target = Path(sys.argv.pop(1))
    pretrain = time_parts(float(os.environ["SPAWNED"]))
    try:
        pretrain.run()
    finally:
        target.write_text(json.dumps(_records))


if __name__ == "__main__":
    # Inside the guard: the helper processes of a save import this file again.
    from trinity_megatron.process.rank import enter_rank

    enter_rank()
    main()
