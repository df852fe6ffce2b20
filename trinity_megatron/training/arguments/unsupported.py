"""Megatron's flags that a Trinity run does not follow: refused or reported, never ignored.

Which flags these are, and why, is the table ``unsupported_flags.toml``; ``docs/flags.md`` is made
from it.
"""

from __future__ import annotations

import argparse
import importlib.util
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host
from trinity_megatron.data.mixture.corpora import MixtureOutline
from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import flag_of
from trinity_megatron.process.screen import tell_once

_TABLE = Path(__file__).with_name("unsupported_flags.toml")
_TRANSFORMER_ENGINE = "--transformer-impl transformer_engine"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why some flags are not followed.

    Attributes:
        flags: Option strings.
        refused: What is wrong with them, a clause after the flag; None where they are harmless.
        ignored: Why the run is the same without them; None where they are refused.
        remedy: What to do instead of giving a refused flag.
        unless: Conditions under which they are followed; one is enough.  See the table.
    """

    flags: tuple[str, ...]
    refused: str | None = None
    ignored: str | None = None
    remedy: str = "drop the flag"
    unless: tuple[str, ...] = ()

    def holds(self, args: argparse.Namespace, mixture: MixtureOutline | None = None) -> bool:
        """Whether the run does not follow the flags."""
        return not any(
            all(_is_met(part, args, mixture) for part in condition.split("+"))
            for condition in self.unless
        )


@cache
def load_reasons() -> tuple[Reason, ...]:
    """The table of all flags that are not followed in every run."""
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    reasons = []
    for entry in table["reason"]:
        flags, unless = tuple(entry.pop("flags")), tuple(entry.pop("unless", ()))
        reasons.append(Reason(flags=flags, unless=unless, **entry))
    return tuple(reasons)


def refuse_flags(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    mixture: MixtureOutline | None = None,
) -> None:
    """Refuse what the run would not follow; say what has no effect on it.

    Args:
        args: Of the run; may lack some arguments, which are not looked at then.
        parser: That made them: a flag is given where its value is not the parser's default.
        mixture: That ``--data`` names; None for a prepared folder and without.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    given = [
        (reason, flag)
        for reason in load_reasons()
        for flag in _given_flags(reason, args, parser)
        if reason.holds(args, mixture)
    ]
    for reason, flag in given:
        if reason.refused:
            raise UserError(f"{flag} {reason.refused}. Remedy: {reason.remedy}.")
    for reason, flag in given:
        tell_once(f"> {flag} has no effect: {reason.ignored}")


def refuse_host(args: argparse.Namespace) -> None:
    """Refuse implementations and backends that this host or the layers do not have.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    if is_cpu_host():
        for name, wrong, right in (
            ("transformer_impl", "transformer_engine", "--transformer-impl local"),
            ("distributed_backend", "nccl", "--distributed-backend gloo"),
        ):
            if getattr(args, name) == wrong:
                raise UserError(
                    f"{flag_of(name)} {wrong} needs a CUDA device, and torch finds none on this "
                    f"machine. Remedy: {right} (the default here)."
                )
    backend = args.attention_backend.name
    if args.transformer_impl == "local" and backend not in ("auto", "local"):
        raise UserError(
            f"--attention-backend {backend} chooses among Transformer Engine's, and "
            f"--transformer-impl is local. Remedy: drop the flag, or {_TRANSFORMER_ENGINE}."
        )


def _given_flags(
    reason: Reason, args: argparse.Namespace, parser: argparse.ArgumentParser
) -> Iterator[str]:
    """Flags of a reason with a value that is not the default, as they would be typed."""
    for flag in reason.flags:
        action = parser._option_string_actions.get(flag)
        if action is None:  # another Megatron
            continue
        default = parser.get_default(action.dest)
        value = getattr(args, action.dest, default)
        if value == default:
            continue
        if action.nargs == 0:
            if isinstance(action.const, bool) and value != action.const:
                continue  # another flag of the same argument
            yield flag
        else:
            yield f"{flag} {_typed(value)}"


def _typed(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(getattr(value, "name", value))


def _is_met(condition: str, args: argparse.Namespace, mixture: MixtureOutline | None) -> bool:
    """Whether a condition of the table holds."""
    if condition == "cuda":
        return not is_cpu_host()
    if condition == "raw_text":
        return mixture is not None and mixture.tokenizer is None
    kind, _, package = condition.partition(":")
    if package:
        return importlib.util.find_spec(package) is not None
    name, _, values = condition.partition("=")
    if values:
        return str(getattr(args, name, None)) in values.split("|")
    name, _, low = condition.partition(">")
    value = getattr(args, name, None)
    return (value or 0) > int(low) if low else bool(value)
