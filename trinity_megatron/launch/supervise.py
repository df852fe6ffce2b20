"""``trinity-megatron supervise``: start a run again after a failure, and know when not to.

The ranks of a start are torchrun's, which ends all of them where one fails.  Its own restarts are
not used: they come at once, after any exit code, and cannot tell whether the run gets on.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity_megatron.process.alarms import Alarms, read_webhook
from trinity_megatron.process.heartbeat import read_heartbeat
from trinity_megatron.process.rank import USER_ERROR, end_with_parent

LOG_NAME = "supervise.log"
_LONGEST_WAIT = 300.0
_KEPT_LINES = 200
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_MOST_LETTERS = 200
_USER_ERROR = re.compile(r"^(\[rank \d+\] )?error: .+")
_EXCEPTION = re.compile(
    r"^(\[rank(?P<rank>\d+)\]: )?[\w.]*(Error|Exception|Iteration|Interrupt|Exit)\b.*"
)
# Of srun, which ends with the largest code: 143 of the ranks that were stopped then.
_TASK_REFUSED = re.compile(rf"^srun: error: .*: Exited with exit code {USER_ERROR}$")
# Of process/watchdog.py: a hang, and that it was none.
_HANG = re.compile(r"^ranks? [\d, ]+( and \d+ more)? hangs?: .+")
_GOES_ON = re.compile(r"^> the run goes on after ")
# Of launch/local.py.
_VERDICT = re.compile(r"^trinity-megatron: (?P<text>(rank (?P<rank>\d+) )?.+)")


@dataclass(frozen=True)
class Patience:
    """When to give up.

    Attributes:
        same_step: Failures one after the other in the same step.
        no_save: Failures one after the other without a new checkpoint.
        wait: Seconds before the next start; doubled with each failure without a new checkpoint.
    """

    same_step: int = 3
    no_save: int = 10
    wait: float = 10.0


@dataclass(frozen=True)
class Ending:
    """How a start has ended.

    Attributes:
        start: The step that it has begun from; None before the training began.
        step: The step that it was in; None before the training began.
        saved: The last step that is saved.
        reason: A line of its error output, or its exit code.
    """

    start: int | None
    step: int | None
    saved: int
    reason: str


def supervise(command: Sequence[str], out: Path, patience: Patience | None = None) -> int:
    """Run a command until it is complete, is ended from outside, or cannot be helped.

    Args:
        command: Program and arguments; the same command goes on with a run that has begun.
        out: Folder of the run; gets ``supervise.log``.
        patience: When to give up.

    Returns:
        0, or the exit code of the last start.

    Raises:
        UserError: The address of the webhook for alarms is none.
    """
    supervisor = _Supervisor(list(command), out, patience or Patience())
    return supervisor.run()


class _Supervisor:
    def __init__(self, command: list[str], out: Path, patience: Patience) -> None:
        self._command, self._out, self._patience = command, out, patience
        self._child: subprocess.Popen[bytes] | None = None
        self._received: signal.Signals | None = None
        self._ended = threading.Event()
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._failures: list[Ending] = []
        self._most_saved = 0
        self._alarms = Alarms(read_webhook(), run=out.resolve().name)

    def run(self) -> int:
        for signum in _FORWARDED:
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._forward)
        number = 0
        while True:
            number += 1
            begin, began_at = time.monotonic(), time.time()
            code = self._start()
            ending = self._describe(code, began_at)
            took = f"after {time.monotonic() - begin:.0f} s"
            name = f"start {number}{_origin(ending.start)}"
            if code == 0:
                self._log(f"{name} has completed the run {took}")
                return 0
            what = f"{name} has failed {_where(ending)} {took}: {ending.reason.rstrip('.')}"
            if self._received is not None:
                self._log(f"{what}. Ended by {self._received.name}")
                return code
            refusal = self._why_not_again(code, ending)
            if refusal is not None:
                self._log(f"{what}. Not started again: {refusal}")
                if code != 128 + signal.SIGINT:
                    self._alarms.send("given up", f"{what}. Not started again: {refusal}")
                    self._alarms.close()
                return code
            wait = self._wait_seconds()
            saved = f"Step {ending.saved} is saved" if ending.saved else "Nothing is saved"
            self._log(f"{what}. {saved}; start {number + 1} in {wait:.0f} s")
            if self._ended.wait(wait):
                return code

    def _start(self) -> int:
        """One start; returns its exit code, as a shell would."""
        self._lines.clear()
        self._child = subprocess.Popen(
            self._command, stderr=subprocess.PIPE, preexec_fn=end_with_parent
        )
        if self._received is not None:  # between two starts
            self._child.terminate()
        copying = threading.Thread(
            target=self._copy_errors, args=(self._child.stderr,), daemon=True
        )
        copying.start()
        code = self._child.wait()
        copying.join(timeout=5)  # a process that outlives the run may hold its error output
        self._child = None
        if any(_TASK_REFUSED.match(line) for line in self._lines):
            return USER_ERROR
        return code if code >= 0 else 128 - code

    def _copy_errors(self, source: Any) -> None:
        for line in source:
            with contextlib.suppress(OSError, ValueError):  # else nobody would empty the pipe
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
            self._lines.append(line.decode(errors="replace").rstrip())

    def _forward(self, signum: int, frame: Any) -> None:
        self._received = signal.Signals(signum)
        self._ended.set()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signum)

    def _describe(self, code: int, began_at: float) -> Ending:
        reason, beat = find_reason(list(self._lines), code), read_heartbeat(self._out)
        if beat is None or beat.time < began_at:  # of an earlier start
            return Ending(None, None, beat.saved if beat else 0, reason)
        return Ending(beat.start, beat.step, beat.saved, reason)

    def _why_not_again(self, code: int, ending: Ending) -> str | None:
        if code == USER_ERROR:
            return "what it says has to be mended first"
        if code == 128 + signal.SIGINT:
            return "it was interrupted"
        if ending.saved > self._most_saved:  # going back to an earlier one is no progress
            self._most_saved = ending.saved
            self._failures.clear()
        self._failures.append(ending)
        in_a_row = 0
        for earlier in reversed(self._failures):
            if earlier.step != ending.step:
                break
            in_a_row += 1
        if in_a_row >= self._patience.same_step:
            return f"it has failed {in_a_row} times in a row {_where(ending)}"
        if len(self._failures) >= self._patience.no_save:
            return f"it has failed {len(self._failures)} times without a new checkpoint"
        return None

    def _wait_seconds(self) -> float:
        return min(self._patience.wait * 2 ** (len(self._failures) - 1), _LONGEST_WAIT)

    def _log(self, message: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}"
        with contextlib.suppress(OSError, ValueError):
            print(f"supervise: {line}", file=sys.stderr, flush=True)
        if not self._out.is_dir():  # a new run that was refused: nothing is left of it
            return
        try:
            with (self._out / LOG_NAME).open("a") as file:
                print(line, file=file, flush=True)
        except OSError as error:
            print(f"supervise: {LOG_NAME} is not written: {error}", file=sys.stderr, flush=True)


def find_reason(lines: Sequence[str], code: int) -> str:
    """The line of an error output that says most; else the exit code.

    A rank that is killed says nothing, and the others complain of the connection: the launcher
    knows which failed first.  Where one hangs the others complain of the time; a line before says
    which.

    Args:
        lines: The last ones of the output.
        code: As a shell has it.
    """
    verdict = next((found for line in lines if (found := _VERDICT.match(line))), None)
    exceptions = [found for line in lines if (found := _EXCEPTION.match(line))]
    if verdict and "was killed by" in verdict["text"]:
        return _shorten(verdict["text"].partition(", as happens")[0])
    of_first = [found for found in exceptions if verdict and found["rank"] == verdict["rank"]]
    refusals = (found for line in lines if (found := _USER_ERROR.match(line)))
    hangs = [] if code == USER_ERROR else _find_hang(lines)
    for found in (*hangs, *refusals, *of_first, *exceptions):
        return _shorten(found[0])
    if verdict:
        return _shorten(verdict["text"])
    if code > 128 and code - 128 in signal.valid_signals():
        return f"ended by {signal.Signals(code - 128).name}"
    return f"exit code {code}"


def _find_hang(lines: Sequence[str]) -> list[re.Match[str]]:
    """The last hang that the run has not gone on from; an empty list without one."""
    hangs: list[re.Match[str]] = []
    for line in lines:
        if _GOES_ON.match(line):
            hangs.clear()
        elif found := _HANG.match(line):
            hangs[:] = [found]
    return hangs


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."


def _where(ending: Ending) -> str:
    return "before its first step" if ending.step is None else f"in step {ending.step}"


def _origin(step: int | None) -> str:
    if step is None:
        return ""
    return f" from step {step}" if step else " from the beginning"
