"""Replace an upstream function for the length of a block, and know what it was written against.

Only what :mod:`trinity_megatron.upstream.entries` lists can be replaced.  An entry holds a
fingerprint of the upstream source that the replacement was written against;
:func:`check_upstream` refuses a release whose source differs, before a training begins.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.upstream.entries import REGISTRY
from trinity_megatron.upstream.replacement import Replacement

# Megatron only: torch and TensorBoard are supported in a range of releases.
_CHECKED = "megatron"
_ABSENT = object()


@contextmanager
def replaced(target: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an upstream attribute while the block runs.

    Args:
        target: Of an entry of the registry.
        make: Returns the new value; its argument is the present one, or None where upstream has
            none (an optional package that it has not found).
    """
    assert target in REGISTRY, f"{target} is not in trinity_megatron/upstream/entries.py"
    owner, name = _resolve(target)
    before = inspect.getattr_static(owner, name, _ABSENT)
    made = make(getattr(owner, name, None))
    setattr(owner, name, staticmethod(made) if isinstance(before, staticmethod) else made)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def replace(target: str, value: Any) -> None:
    """Replace an upstream attribute until the process ends.

    For what stands in for CUDA on a CPU host, which is entered once and not left.

    Args:
        target: Of an entry of the registry.
        value: The new value.
    """
    assert target in REGISTRY, f"{target} is not in trinity_megatron/upstream/entries.py"
    owner, name = _resolve(target)
    if isinstance(value, FunctionType):
        value.__wrapped__ = getattr(owner, name)  # type: ignore[attr-defined]
    setattr(owner, name, value)


def check_upstream(entries: Iterable[Replacement], *, allow_changes: bool = False) -> list[str]:
    """Compare the installed sources with those that the replacements were written against.

    Args:
        entries: Of the registry.
        allow_changes: Return the differences instead of raising.

    Returns:
        One line for each upstream function that differs.

    Raises:
        UserError: A function differs or is missing; names it.
    """
    changed = [entry for entry in entries if not _is_known(entry)]
    lines = [f"{entry.source_of or entry.target} ({entry.reason})" for entry in changed]
    if lines and not allow_changes:
        raise UserError(
            "the installed Megatron-Core differs from the one that trinity_megatron was written "
            f"for, in what it replaces: {'; '.join(lines)}. Remedy: pip install "
            "megatron-core==0.19.2, or --allow-upstream-changes to train all the same."
        )
    return lines


def fingerprint(entry: Replacement) -> str:
    """Fingerprint of the installed source of an entry; empty where it is not checked.

    Raises:
        AttributeError: The function is missing.
    """
    if not entry.target.startswith(f"{_CHECKED}."):
        return ""
    owner, name = _resolve(entry.source_of or entry.target)
    value = inspect.getattr_static(owner, name)
    value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    source = inspect.getsource(inspect.unwrap(value))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _is_known(entry: Replacement) -> bool:
    found = _fingerprint_or_none(entry)
    return found is not None and found in (entry.fingerprint, entry.patched or entry.fingerprint)


def _fingerprint_or_none(entry: Replacement) -> str | None:
    try:
        return fingerprint(entry)
    except (AttributeError, ImportError, OSError):
        return None


def _resolve(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    return owner, name
