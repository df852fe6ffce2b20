"""A thread that notices when a rank does not move, says which rank hangs, and ends what is dead."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trinity_megatron.process.alarms import Alarms
from trinity_megatron.process.screen import tell
from trinity_megatron.process.stall import (
    Stall,
    describe_hang,
    describe_stall,
    find_place,
    read_stalls,
    record_path,
    write_stall,
)

# Shares of the time in which a hang is named: looks, the first alarm, waits for the other ranks.
_TICK, _ALARM, _GRACE, _NUM_GRACES = 1 / 40, 0.8, 0.05, 3
# A rank that has used less of a processor, and moved less, is not at work.
_IDLE_SHARE, _IDLE_BYTES = 0.05, 2**20


@dataclass(frozen=True)
class _Beat:
    """When something has happened, and where in the run.

    Attributes:
        time: Of the monotonic clock, in seconds.
        where: A clause, e.g. ``in step 3``.
    """

    time: float
    where: str


class Watchdog:
    """Watches the main thread of this process, which tells it with :meth:`beat` that it moves.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        folder: For stacks and records, shared by all ranks; None for the error output only.
        seconds: Within which a hang is named; or three times ``longest``, if that is more.
        end_after: Returns the seconds after which a rank that is in no collective and does no work
            is ended; those in one are ended by torch.
        find_collective: Returns what the device of this rank waits in; None for nothing.
        alarms: Are told what is said of a hang.

    Attributes:
        longest: Seconds of the longest step so far, which the caller keeps up to date.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        folder: Path | None,
        *,
        seconds: float,
        end_after: Callable[[], float],
        find_collective: Callable[[], str | None] = lambda: None,
        alarms: Alarms | None = None,
    ) -> None:
        self.longest = 0.0
        self._rank, self._world_size, self._folder = rank, world_size, folder
        self._seconds, self._end_after = seconds, end_after
        self._find_collective = find_collective
        self._alarms = alarms or Alarms()
        self._beat = _Beat(time.monotonic(), "in start-up")
        self._main = threading.main_thread().ident or 0
        self._started = time.time()
        self._has_spoken = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        """Watch from now on."""
        self._forget_record()
        self._arm()
        self._thread.start()

    def beat(self, where: str | None = None) -> None:
        """Something has happened.

        Args:
            where: In the run; None for where it was before.
        """
        self._beat = _Beat(time.monotonic(), where or self._beat.where)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._seconds * _TICK)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick = self._seconds * _TICK
        seen, num_alarms, work, previous = self._beat, 0, _work(), time.monotonic()
        while not self._stopped.wait(tick):
            self._arm()
            now, beat = time.monotonic(), self._beat
            if now - previous > self._seconds / 2:  # the process was stopped for a while
                self.beat()
                beat = self._beat
            previous = now
            if beat is not seen:
                if num_alarms:
                    self._go_on(now - seen.time)
                seen, num_alarms, work = beat, 0, _work()
            late = now - beat.time
            if late > max(self._seconds * _ALARM, 3 * self.longest) * 2**num_alarms:
                num_alarms += 1
                self._alarm(beat, late)
            if late > self._end_after() + self._seconds and _is_idle(work, late):
                self._end(beat, late)

    def _arm(self) -> None:
        """Let a thread of C write stacks, should this one get no turn of the interpreter."""
        with contextlib.suppress(ValueError, OSError, RuntimeError):
            faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or 2)

    def _alarm(self, beat: _Beat, late: float) -> None:
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        place, collective = find_place(stack)
        stall = Stall(self._rank, time.time(), late, beat.where, place, collective)
        if self._folder is None:
            if self._rank == 0 or collective is None:
                self._tell(describe_stall(stall))
            return
        try:
            self._write_stacks(self._folder, stall)
            found = self._find_collective() or collective
            write_stall(self._folder, Stall(**{**vars(stall), "collective": found}))
        except OSError as error:
            tell(f"rank {self._rank}: no stacks written ({error})", is_error=True)
            return
        self._tell_who(self._folder, beat)

    def _write_stacks(self, folder: Path, stall: Stall) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank_{self._rank:05d}.txt").open("a") as file:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            print(when, describe_stall(stall), file=file, flush=True)
            faulthandler.dump_traceback(file)

    def _tell_who(self, folder: Path, beat: _Beat) -> None:
        """Say which rank hangs, once all have written; the first one that has speaks."""
        for _ in range(_NUM_GRACES):
            if self._stopped.wait(self._seconds * _GRACE) or self._beat is not beat:
                return
            stalls = read_stalls(folder, self._world_size, self._started)
            if len(stalls) == self._world_size:
                break
        if stalls and stalls[0].rank == self._rank:
            self._has_spoken = True
            self._tell(f"{describe_hang(stalls, self._world_size)}. Stacks of all ranks: {folder}")

    def _tell(self, message: str) -> None:
        tell(message, is_error=True)
        self._alarms.send("hang", message)

    def _go_on(self, seconds: float) -> None:
        self._forget_record()
        if self._has_spoken:
            self._has_spoken = False
            tell(f"> the run goes on after {seconds:.0f} s", is_error=True)
            self._alarms.send("hang", f"the run goes on after {seconds:.0f} s")

    def _forget_record(self) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                record_path(self._folder, self._rank).unlink(missing_ok=True)

    def _end(self, beat: _Beat, late: float) -> None:
        place, collective = find_place(traceback.extract_stack(sys._current_frames()[self._main]))
        if collective is not None or self._find_collective() is not None:
            return
        self._tell(
            f"error: rank {self._rank} has not moved for {late:.0f} s {beat.where}, in {place}, "
            "and neither computes nor reads nor writes: it is ended. Remedy: mend what it waits "
            "for; or a longer --distributed-timeout-minutes."
        )
        self._alarms.close()
        os._exit(1)


def _work() -> tuple[float, int]:
    """Seconds of processor, and bytes that this process has read and written."""
    moved = 0
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()[:2]  # rchar, wchar
        moved = sum(int(line.split()[1]) for line in lines)
    return time.process_time(), moved


def _is_idle(before: tuple[float, int], seconds: float) -> bool:
    computed, moved = (now - then for now, then in zip(_work(), before, strict=True))
    return computed < _IDLE_SHARE * seconds and moved < _IDLE_BYTES
