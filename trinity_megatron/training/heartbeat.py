"""Notice when no step ends any more: name the rank that the others wait for, and write its stacks.

The collectives give up after ``--distributed-timeout-minutes``, and then every rank complains of
the others.  Before that each rank looks at itself: one that is not in a collective is the late one.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.training import get_args, training

# Source: report section 3.3, an alarm if no step completes within three minutes.
SECONDS = 180.0
STACKS_NAME = "stacks"
# Where a rank waits for others; on a GPU that is where the host waits for the device.
_WAITING = ("torch/distributed/", "torch/cuda/")


class Heartbeat:
    """Watches the steps of this rank from a thread of its own.

    Args:
        rank: This rank.
        folder: Where stacks go; None for the error output only.
    """

    def __init__(self, rank: int, folder: Path | None) -> None:
        self._rank, self._folder = rank, folder
        self._step, self._last = 0, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")

    def begin(self, step: int) -> None:
        """Note that a step begins; watching begins with the first one."""
        self._step = step
        if not self._thread.is_alive() and not self._stopped.is_set():
            self.end()
            self._thread.start()

    def end(self) -> None:
        """Note that a step has ended."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        warned = 0.0
        while not self._stopped.wait(SECONDS / 20):
            last = self._last
            if time.monotonic() - last > SECONDS and warned != last:
                warned = last
                self._alarm(time.monotonic() - last)

    def _alarm(self, seconds: float) -> None:
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        waits = any(part in frame.filename for frame in stack[-3:] for part in _WAITING)
        where = f"is in {stack[-1].name}, {stack[-1].filename}:{stack[-1].lineno}"
        message = (
            f"rank {self._rank}: no step has ended for {seconds:.0f} s, in step {self._step}; it "
            f"{'waits for other ranks or its device' if waits else where}"
        )
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"rank_{self._rank:05d}.txt"
            with path.open("a") as file:
                print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=file, flush=True)
                faulthandler.dump_traceback(file)
            message += f"; stacks of all ranks in {self._folder}"
        if self._rank == 0 or not waits:
            print(message, file=sys.stderr, flush=True)


@contextmanager
def watch_steps() -> Iterator[None]:
    """Watch Megatron's training steps while the block runs."""
    args, train_step = get_args(), training.train_step
    heart = Heartbeat(args.rank, Path(args.out) / STACKS_NAME if args.out else None)

    def wrapper(*given: Any, **settings: Any) -> Any:
        heart.begin(args.curr_iteration + 1)
        result = train_step(*given, **settings)
        heart.end()
        return result

    wrapped: Callable[..., Any] = wrapper
    training.train_step = wrapped
    try:
        yield
    finally:
        heart.stop()
        training.train_step = train_step
