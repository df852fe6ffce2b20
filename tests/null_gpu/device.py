"""Read what the null device of this process has counted."""

import ctypes
import os
from collections import Counter
from pathlib import Path

# The order is that of ``enum counter`` in counters.h.
COUNTERS = (
    "launches",
    "copies_to_device",
    "copies_to_host",
    "copies_on_device",
    "memsets",
    "stream_syncs",
    "device_syncs",
    "event_syncs",
    "allocations",
    "library_calls",
)


class NullDevice:
    """The counters of the library that this process has preloaded.

    Raises:
        RuntimeError: The process was started without it.
    """

    def __init__(self) -> None:
        path = os.environ.get("NULL_GPU_LIBRARY")
        if path is None:
            raise RuntimeError("This process has no null GPU: see tests/null_gpu/build.py.")
        self._library = ctypes.CDLL(path)

    def reset(self) -> None:
        """Count from zero."""
        self._library.null_reset()

    def read(self) -> dict[str, int]:
        """Counts since the last reset, by kind."""
        values = (ctypes.c_long * len(COUNTERS))()
        self._library.null_read(values)
        return dict(zip(COUNTERS, values, strict=True))

    def kernels(self, scratch: Path) -> Counter[str]:
        """Launches and library calls since the last reset, by name.

        Args:
            scratch: A file to write them to.
        """
        if self._library.null_write(str(scratch).encode()):
            raise OSError(f"{scratch} cannot be written")
        lines = (line.split("\t") for line in scratch.read_text().splitlines())
        return Counter({name: int(count) for count, name in lines})
