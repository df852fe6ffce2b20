"""Writing and reading more than memory holds, without filling the page cache.

What is converted is not read again soon.  Left to itself the kernel would keep all of it, push out
what other programs have cached, and spend most of the time on finding memory for the pages.
"""

import os

_STEP_BYTES = 32 * 2**20


class WriteBehind:
    """Sends what was written to the disk, every few megabytes, and gives its memory back.

    Args:
        file: Descriptor of a file that is open for writing.
    """

    def __init__(self, file: int) -> None:
        self._file, self._pending = file, 0

    def wrote(self, num_bytes: int) -> None:
        """Call it after each write."""
        self._pending += num_bytes
        if self._pending >= _STEP_BYTES:
            self._pending = 0
            self.flush()

    def flush(self) -> None:
        """Wait for the disk, then give the memory back."""
        os.fdatasync(self._file)
        forget(self._file)


def forget(file: int, offset: int = 0, length: int = 0) -> None:
    """Give back the memory that holds (clean) parts of a file.

    Args:
        file: Its descriptor.
        offset: First byte.
        length: Number of bytes; 0 for all from there.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)
