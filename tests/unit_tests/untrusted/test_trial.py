"""Work that is tried apart ends, whatever it does, and harms nothing."""

import os
import time

import pytest

from trinity_megatron.untrusted.trial import try_apart

MIB = 2**20


def spin() -> None:
    while True:
        pass


def fail() -> None:
    raise KeyError("of the work")


@pytest.mark.parametrize(
    ("work", "needed"),
    [
        (lambda: None, None),
        (fail, None),
        (lambda: bytearray(8 * MIB), None),
        (spin, "processor time"),
        (lambda: 10 ** (10**9), "processor time"),
        (lambda: bytearray(2**40), "of memory"),
        (lambda: [bytearray(MIB) for _ in range(1000)], "of memory"),
        (os.abort, "of memory"),  # as a Rust library ends where it gets none
    ],
)
def test_what_is_needed(work, needed: str | None) -> None:  # type: ignore[no-untyped-def]
    begin = time.monotonic()
    found = try_apart(work, seconds=1, num_bytes=64 * MIB)
    assert found is None if needed is None else needed in str(found)
    assert time.monotonic() - begin < 60
