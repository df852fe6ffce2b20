"""The alarms of a training, and that of its end with an error."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trinity_megatron.process.alarms import Alarms, read_webhook
from trinity_megatron.process.rank import describe_error, is_user_error

# Made by the first rank that ends with an error: the others then complain of its silence.
_MARK = Path("logs", ".ended_with_error")


@contextmanager
def alarms_of(args: argparse.Namespace) -> Iterator[Alarms]:
    """Where the callbacks of a run send alarms; an error that leaves the block is one too.

    Args:
        args: Of the run, checked.

    Raises:
        UserError: The address of the webhook is none.
    """

    def step() -> int | None:
        return args.curr_iteration + 1 if hasattr(args, "curr_iteration") else None

    run = Path(args.out).resolve().name if args.out else args.wandb_exp_name or ""
    alarms = Alarms(read_webhook(), run=run, rank=args.rank, step=step)
    if alarms.is_on and args.out and args.rank == 0:
        with suppress(OSError):
            Path(args.out, _MARK).unlink(missing_ok=True)
    try:
        yield alarms
    except BaseException as error:
        text = _describe_end(error)
        if text and alarms.is_on and _is_first(args):
            alarms.send("error", text)
        raise
    finally:
        alarms.close()


def _describe_end(error: BaseException) -> str | None:
    """What an exception says of the end of a run; None where somebody has ended it."""
    if isinstance(error, KeyboardInterrupt):
        return None
    if isinstance(error, SystemExit):
        return f"the run ends with exit code {error.code}" if error.code else None
    if is_user_error(error):
        return f"the run ends: {describe_error(error)}"
    first, *_ = str(error).strip().splitlines() or [""]
    return f"the run ends: {type(error).__name__}: {first}".rstrip(": ")


def _is_first(args: argparse.Namespace) -> bool:
    """Whether no other rank has ended with an error before; rank 0 decides without a folder."""
    if not args.out:
        return args.rank == 0
    try:
        os.close(os.open(Path(args.out, _MARK), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # the disk may be the error
        return args.rank == 0
    return True
