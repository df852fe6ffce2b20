"""Signals that ask a run to end: it saves after its step, says so, and ends.

SIGTERM, SIGHUP, Ctrl-C and the signal of ``--exit-signal`` do the same, on one rank or on all.
Megatron looks after every step whether one has come; before its loop there is nothing to save, and
a signal ends the run.  A save after the loop is completed first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.training.dist_signal_handler import DistributedSignalHandler, all_gather_item
from megatron.training.global_vars import get_signal_handler

from trinity_megatron.errors import UserError
from trinity_megatron.process.rank import SECONDS_BETWEEN_INTERRUPTS
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.upstream.registry import replaced

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class EndedBySignal(SystemExit):
    """The run has saved what there was to save, and ends because of a signal.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(0)
        self.signum = signum


class SignalNotes(DistributedSignalHandler):
    """Megatron's handler, for several signals: notes the first that comes to this rank.

    Args:
        args: Of the run, after Megatron has set its globals.

    Attributes:
        agreed: The signal that all ranks know of; 0 for none.

    Raises:
        EndedBySignal: One has come already.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.exit_signal)
        self._signal_received: int = 0
        self.agreed = 0
        self._rank, self._last = args.rank, 0.0
        megatrons = get_signal_handler()
        megatrons.release()  # before the loop and after it nobody would look
        if megatrons._signal_received:
            raise EndedBySignal(args.exit_signal)
        # What was ignored at the start stays so, as under nohup; but a script's background jobs
        # ignore SIGINT, and whoever sends one to such a job means it.
        self._signals = [
            signum
            for signum in dict.fromkeys((*_SIGNALS, args.exit_signal))
            if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN
        ]
        self._before: dict[int, Any] = {}

    @property
    def is_listening(self) -> bool:
        """Whether signals are noted instead of ending the process."""
        return bool(self._before)

    def listen(self) -> None:
        """Note signals from now on."""
        for signum in self._signals:
            self._before[signum] = signal.signal(signum, self._note)

    def finish(self) -> None:
        """Let signals end the process again; call it on all ranks.

        Raises:
            EndedBySignal: One has come to some rank.
        """
        if not self.is_listening:
            return
        self.signals_received()
        self.release()
        if self.agreed:
            raise EndedBySignal(self.agreed)

    def release(self) -> None:
        """Let signals end the process again."""
        while self._before:
            signal.signal(*self._before.popitem())

    def signals_received(self) -> list[int]:
        """What has come to each rank, 0 for nothing; Megatron asks on all ranks after a step."""
        received = all_gather_item(self._signal_received, dtype=torch.int32)
        self.agreed = max(received)
        return received

    def _note(self, signum: int, frame: Any) -> None:
        now, last = time.monotonic(), self._last
        self._last = now
        if self._signal_received:
            if signum == signal.SIGINT and now - last > SECONDS_BETWEEN_INTERRUPTS:
                raise KeyboardInterrupt
            return
        self._signal_received = signum
        if self._rank == 0 and signum == signal.SIGINT:
            with contextlib.suppress(OSError):
                # Not by print(), which may be what the signal has interrupted.
                os.write(1, b"\n> ends after this step and saves; Ctrl-C again ends at once\n")


def check_exit_signal(args: argparse.Namespace) -> None:
    """Refuse an ``--exit-signal`` that would not save.

    Raises:
        UserError: It cannot be handled, or nothing would look for it.
    """
    name = signal.Signals(args.exit_signal).name
    if args.exit_signal in (signal.SIGKILL, signal.SIGSTOP):
        raise UserError(
            f"--exit-signal {name} cannot be handled by any process. Remedy: SIGUSR1, SIGUSR2, "
            "SIGHUP or SIGTERM."
        )
    if args.exit_signal != signal.SIGTERM and not args.exit_signal_handler:
        raise UserError(
            f"--exit-signal {name} without --exit-signal-handler would end the run without a save. "
            "Remedy: add --exit-signal-handler."
        )


@contextmanager
def save_on_signals(args: argparse.Namespace) -> Iterator[Callback]:
    """A callback that notes signals from the start of the training loop to the end of its save.

    Args:
        args: Of the run, after Megatron has set its globals.

    Raises:
        EndedBySignal: A signal has come, and what there was to save is saved.
    """
    if not args.exit_signal_handler:
        yield Callback()
        return
    notes = SignalNotes(args)
    try:
        with replaced("megatron.training.training:get_signal_handler", lambda _: lambda: notes):
            yield _SignalCallback(notes, args.async_save)
            notes.finish()
    except SystemExit as end:
        # Megatron's is 0, as if the run had come to its end.
        if notes.agreed and not end.code:
            raise EndedBySignal(notes.agreed) from None
        raise
    finally:
        notes.release()


class _SignalCallback(Callback):
    def __init__(self, notes: SignalNotes, saves_until_end: bool) -> None:
        self._notes, self._saves_until_end = notes, saves_until_end
        self._is_in_loop = False

    def on_train_start(self) -> None:
        self._notes.listen()
        self._is_in_loop = True

    def on_train_end(self) -> None:
        self._is_in_loop = False

    def on_evaluation_start(self) -> None:
        # The save after the loop is complete, unless it goes on in the background.
        if not self._is_in_loop and not self._saves_until_end:
            self._notes.finish()
