"""Ctrl-C and SIGTERM: the run saves and ends after its step.

Megatron's handler of ``--exit-signal`` only notes the signal, for the training loop to look at.
Before the loop and after it nobody looks: there the handler is off, and the signal ends the run.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.training import get_args, training
from megatron.training.global_vars import get_signal_handler

from trinity_megatron.training.replaced import replaced

# What Ctrl-C was; Megatron's handler knows of its own signal only.
_interrupts: list[int] = []


@contextmanager
def save_on_signals(args: argparse.Namespace) -> Iterator[None]:
    """Handle signals while Megatron's training loop runs, and there only.

    Args:
        args: Of the run, after Megatron has set its globals.
    """
    if not args.exit_signal_handler:
        yield
        return
    handler = signal.getsignal(args.exit_signal)

    def around(train: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any, **settings: Any) -> Any:
            before = signal.getsignal(signal.SIGINT)
            signal.signal(args.exit_signal, handler)
            if args.exit_signal != signal.SIGINT:
                signal.signal(signal.SIGINT, _stop_after_this_step)
            try:
                return train(*given, **settings)
            finally:
                signal.signal(signal.SIGINT, before)
                signal.signal(args.exit_signal, signal.SIG_DFL)

        return wrapper

    signal.signal(args.exit_signal, signal.SIG_DFL)
    try:
        with replaced(training, "train", around):
            yield
    finally:
        get_signal_handler().release()


def _stop_after_this_step(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _interrupts.append(signum)
    args = get_args()
    if args.rank == 0:
        print("\n> ends after this step and saves; Ctrl-C again ends at once", flush=True)
    os.kill(os.getpid(), args.exit_signal)


def signal_of_end() -> int | None:
    """The signal that ended the training, if one did."""
    if _interrupts:
        return _interrupts[0]
    try:
        return get_args().exit_signal if get_signal_handler()._signal_received else None
    except AssertionError:  # there are no arguments yet, or no handler
        return None
