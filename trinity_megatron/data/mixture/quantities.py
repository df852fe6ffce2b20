"""Numbers of tokens as people write them: ``10T``, ``2.5B``, ``400M``."""

from __future__ import annotations

import re
from decimal import Decimal

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_QUANTITY = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([KMBGT]?)", re.IGNORECASE)
MAX_TOKENS = 10**18  # sums of several stay in 64 bits


def parse_tokens(value: object) -> int:
    """A number of tokens.

    Args:
        value: A whole number, or a text of a number and a unit: K, M, B (or G) or T, in powers of
            1,000.

    Raises:
        ValueError: It is no whole number of tokens between 1 and 10^18; says what is wrong.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is no number of tokens")
    text = str(value).strip()
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no number of tokens, as 10T, 2.5B or 400M are")
    tokens = Decimal(match[1].replace("_", "")) * _FACTORS[match[2].upper()]
    if tokens != tokens.to_integral_value():
        raise ValueError(f"{text!r} is no whole number of tokens")
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"{text!r} is not between 1 token and {MAX_TOKENS:.0e}")
    return int(tokens)


def format_tokens(tokens: int) -> str:
    """A number of tokens in four digits, with its unit: ``10.00T``, ``512``."""
    for unit in ("T", "B", "M", "K"):
        if tokens >= _FACTORS[unit]:
            return f"{tokens / _FACTORS[unit]:.2f}{unit}"
    return str(tokens)
