"""Notice when no step ends any more: say where each rank is, and write its stacks.

The collectives give up after ``--distributed-timeout-minutes``, and then every rank complains of
the others.  Before that each rank looks at itself: one that is outside of torch and Megatron,
reading data or in code of the user's, is the one that the others wait for.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.training import get_args

from trinity_megatron.process.screen import tell
from trinity_megatron.training.callbacks.callback import Callback

# Source: report section 3.3, an alarm if no step completes within three minutes.
SECONDS = 180.0
STACKS_NAME = "stacks"
# Where a rank is that waits for others, or on a GPU for its device.
_WAITING = ("/torch/", "/megatron/", "/trinity_megatron/")


class HangWatchdog(Callback):
    """Watches the steps of this rank from a thread of its own.

    Args:
        rank: This rank.
        folder: Where stacks go; None for the error output only.
    """

    def __init__(self, rank: int, folder: Path | None) -> None:
        self._rank, self._folder = rank, folder
        self._where, self._last, self._longest = "", 0.0, 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
        """Record the start of a step; the first one starts the thread."""
        self._where, self._last = f"in step {iteration}", time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Record the end of a step."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._where, self._last = f"after step {iteration}", now

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        warned = 0.0
        while not self._stopped.wait(SECONDS / 20):
            last = self._last
            late = time.monotonic() - last
            if late > max(SECONDS, 3 * self._longest) and warned != last:
                warned = last
                self._alarm(late)

    def _alarm(self, seconds: float) -> None:
        frame = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])[
            -1
        ]
        waits = any(part in frame.filename for part in _WAITING)
        message = (
            f"rank {self._rank}: nothing has happened for {seconds:.0f} s {self._where}; it is in "
            f"{frame.name}, {frame.filename}:{frame.lineno}"
        )
        if self._rank == 0 or not waits:
            where = f"; stacks of all ranks in {self._folder}" if self._folder else ""
            tell(f"{message}{where}", is_error=True)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._rank:05d}.txt").open("a") as file:
                print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=file, flush=True)
                faulthandler.dump_traceback(file)
        except OSError as error:
            tell(f"rank {self._rank}: no stacks written ({error})", is_error=True)


@contextmanager
def watch_steps() -> Iterator[HangWatchdog]:
    """A watchdog of the run, which stops at the end of the block."""
    args = get_args()
    watchdog = HangWatchdog(args.rank, Path(args.out) / STACKS_NAME if args.out else None)
    try:
        yield watchdog
    finally:
        watchdog.stop()
