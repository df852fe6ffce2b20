"""Ctrl-C and SIGTERM: the run saves and ends after its step.

Megatron's handler of ``--exit-signal`` only notes the signal, for the loop to look at.  While a
rank waits for the others at the start nobody looks, so the handler is put on when all are there.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from typing import Any

from megatron.training import get_args
from megatron.training.global_vars import get_signal_handler

# What Ctrl-C was; Megatron's handler knows of its own signal only.
_interrupts: list[int] = []


def postpone(args: argparse.Namespace) -> Callable[[], None]:
    """Take Megatron's handler off.

    Args:
        args: Of the run, after Megatron has set its globals.

    Returns:
        What puts it on again, and lets Ctrl-C do the same.
    """
    if not args.exit_signal_handler:
        return lambda: None
    handler = signal.getsignal(args.exit_signal)
    signal.signal(args.exit_signal, signal.SIG_DFL)
    owner = os.getpid()

    def stop_after_this_step(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.getpid() != owner:  # a worker that loads data
            return
        _interrupts.append(signum)
        if args.rank == 0:
            print("\n> ends after this step and saves; Ctrl-C again ends at once", flush=True)
        os.kill(owner, args.exit_signal)

    def arm() -> None:
        signal.signal(args.exit_signal, handler)
        if args.exit_signal != signal.SIGINT:
            signal.signal(signal.SIGINT, stop_after_this_step)

    return arm


def signal_of_end() -> int | None:
    """The signal that ended the training, if one did."""
    if _interrupts:
        return _interrupts[0]
    try:
        return get_args().exit_signal if get_signal_handler()._signal_received else None
    except AssertionError:  # there are no arguments yet, or no handler
        return None
