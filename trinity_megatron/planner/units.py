"""Numbers as a command line writes them."""

from trinity_megatron.errors import UserError

_POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}


def parse_count(flag: str, text: str) -> float:
    """A number with a suffix K, M, B or T.

    Raises:
        UserError: It is none, or not positive.
    """
    number, suffix = (text, "") if text[-1:].isdigit() else (text[:-1], text[-1:].upper())
    try:
        value = float(number) * 10 ** _POWERS[suffix]
    except (KeyError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{flag} {text!r} is no positive number. Remedy: for example 17T or 500B.")
    return value
