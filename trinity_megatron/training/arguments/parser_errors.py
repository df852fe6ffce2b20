"""Errors of the command line in one sentence: argparse's, and those of Megatron's own checks."""

from __future__ import annotations

import argparse
import contextlib
import linecache
import re
import traceback
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import flag_of


@contextlib.contextmanager
def megatron_refusals(
    kinds: tuple[type[Exception], ...] = (AssertionError, RuntimeError, ValueError),
    has_begun: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Say in one sentence what Megatron's checks of arguments and configuration refuse.

    Args:
        kinds: Exceptions of Megatron's own that refuse an argument here.
        has_begun: Whether the steps have begun: an exception is a bug from then on, and keeps its
            trace.

    Raises:
        UserError: Megatron's message, or the check itself where it has none; names the flags.
    """
    try:
        yield
    except kinds as error:
        message = str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = isinstance(error, UserError)
        if is_ours or has_begun() or "megatron" not in Path(frame.filename).parts:
            raise
        checked = "" if message else _statement_of(frame)
        message = " ".join(message.split()).rstrip(".") or f"it is not so that {checked}"
        flags = [flag_of(name) for name in re.findall(r"args\.(\w+)", checked)]
        what = f"see {', '.join(dict.fromkeys(flags))}" if flags else "change what it names"
        raise UserError(f"Megatron refuses the arguments: {message}. Remedy: {what}.") from error


def _statement_of(frame: traceback.FrameSummary) -> str:
    """The condition of the ``assert`` that failed, which may have several lines."""
    first, last = frame.lineno or 0, frame.end_lineno or frame.lineno or 0
    lines = [linecache.getline(frame.filename, number) for number in range(first, last + 1)]
    return " ".join(" ".join(lines).split()).removeprefix("assert ")


def friendly_parser_errors(parser: argparse.ArgumentParser) -> None:
    """Let a wrong flag end in a line with those that are like it, without 700 lines of usage."""

    def refuse(message: str) -> NoReturn:
        if message.startswith("argument "):  # it names flag and value
            raise UserError(f"{message}. Remedy: give another value; --help lists all flags.")
        unknown = message.removeprefix("unrecognized arguments: ").split()
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        close = [name for word in unknown for name in get_close_matches(word, flags, n=2)]
        advice = f"did you mean {' or '.join(close)}?" if close else "--help lists all flags"
        raise UserError(f"{message}. Remedy: {advice}")

    parser.error = refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if callable(action.type) and action.type not in (int, float, str, bool):
            action.type = _named_errors(action.type, action.choices)
        try:
            (action.help or "") % vars(action)
        except ValueError:  # a bare % in Megatron 0.19
            action.help = (action.help or "").replace("%", "%%")


def _named_errors(convert: Callable[[str], Any], choices: Any) -> Callable[[str], Any]:
    """Let argparse name the flag whatever a converter of Megatron's raises, e.g. a KeyError."""

    def wrapper(text: str) -> Any:
        try:
            return convert(text)
        except Exception as error:
            known = [str(getattr(choice, "name", choice)) for choice in choices or ()]
            advice = f"; choose from {', '.join(known)}" if known else ""
            raise argparse.ArgumentTypeError(f"invalid value {text!r}{advice}") from error

    return wrapper
