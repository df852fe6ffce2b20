"""What the user sees of a run: our lines stay on the screen, upstream's go to a log file."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from trinity_megatron.process.console import ForgivingFile

_OURS = "trinity_megatron"


class UpstreamLog(io.TextIOWrapper):
    """The log file in the place of a standard stream.

    Args:
        file: Of the log.
        screen: The stream that it replaces.
    """

    def __init__(self, file: ForgivingFile, screen: TextIO) -> None:
        super().__init__(
            file,  # type: ignore[arg-type]
            encoding="utf-8",
            errors="backslashreplace",
            write_through=True,
        )
        self.screen = screen


def tell(message: str, *, is_error: bool = False, end: str = "\n") -> None:
    """Print to the screen, also while upstream's output goes to a log file.

    Args:
        message: Text of one or more lines.
        is_error: Print to the standard error.
        end: What follows the message.
    """
    stream = screen_of(sys.stderr if is_error else sys.stdout)
    # One write a message: several ranks share a screen.
    stream.write(message + end)
    stream.flush()


def tell_once(message: str) -> None:
    """:func:`tell` on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        tell(message)


def screen_of(stream: TextIO) -> TextIO:
    """The screen behind ``sys.stdout`` or ``sys.stderr``."""
    return stream.screen if isinstance(stream, UpstreamLog) else stream


@contextmanager
def upstream_output_in(path: Path) -> Iterator[None]:
    """Append everything that Megatron, torch and Python's warnings print to a file.

    :func:`tell` and the loggers of this package still reach the screen, and so does the trace of an
    exception that leaves the block.  If the file cannot be opened, the screen has everything.

    Args:
        path: The log; its folder is made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One each: the stream that is collected first closes its file.
        out = UpstreamLog(ForgivingFile(path, "ab"), screen_of(sys.stdout))
        err = UpstreamLog(ForgivingFile(path, "ab"), screen_of(sys.stderr))
    except OSError as error:
        tell(f"> {path} cannot be written ({error.strerror}): it goes to the screen")
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(_logging_to(out, err.screen))
        yield


@contextmanager
def _logging_to(log: TextIO, screen: TextIO) -> Iterator[None]:
    """Let the root logger write to the log, and the logger of this package to the screen."""
    handlers = [h for h in logging.root.handlers if isinstance(h, logging.StreamHandler)]
    on_screen = [h for h in handlers if h.stream in (screen_of(sys.stdout), screen)]
    ours, handler = logging.getLogger(_OURS), logging.StreamHandler(screen)
    streams = [h.setStream(log) for h in on_screen]
    ours.addHandler(handler)
    propagates, ours.propagate = ours.propagate, False
    try:
        yield
    finally:
        ours.propagate = propagates
        ours.removeHandler(handler)
        for before, stream in zip(on_screen, streams, strict=True):
            before.setStream(stream)
