"""JSON from elsewhere: a short file may not become many gigabytes of objects."""

import json
from pathlib import Path
from typing import Any

# Far above every config, index of weights or tokenizer; an object of JSON takes up to 30 times the
# bytes that it is written with.
MAX_BYTES = 64 * 2**20
# Above it content must be text rather than brackets: each pair of these is an object of 64 bytes.
_BYTES_PER_BRACKET = 16
_MAX_DEPTH = 200


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file.

    Args:
        path: The file.
        max_bytes: Largest size of the file.

    Raises:
        ValueError: It is no JSON in UTF-8, is nested too deeply, or is too large.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes >> 20} MiB")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """The value of a JSON text.

    Args:
        content: The text in UTF-8.

    Raises:
        ValueError: It is no JSON in UTF-8, is nested too deeply, or would take far more memory than
            its text does.
    """
    brackets = content.count(b"[") + content.count(b"{")
    if len(content) > MAX_BYTES and brackets * _BYTES_PER_BRACKET > len(content):
        raise ValueError(f"{len(content) >> 20} MiB of JSON hold {brackets} objects")
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if brackets > _MAX_DEPTH:
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse a value that functions which call themselves could not follow.

    Args:
        value: Of JSON.

    Raises:
        ValueError: It is nested too deeply.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [
            part for each in inner for part in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")
