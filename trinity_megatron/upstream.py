"""Stand around a function of Megatron for the length of a block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute while the block runs.

    Args:
        owner: Module or object.
        name: The attribute.
        make: Makes the new value of the old one.
    """
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)
