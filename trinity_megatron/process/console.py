"""Standard output and error that can fail without harm: what cannot be written there is dropped.

A terminal that has no letter for a character, one that goes away, a closed pipe and a full disk
under a redirected log are no reasons to lose a training.
"""

import errno
import io
import os
import select
import sys
from contextlib import suppress


class ForgivingFile(io.FileIO):
    """An open file descriptor whose writes do not fail.

    Attributes:
        failure: The latest error of a write; None if all is written.
    """

    failure: OSError | None = None

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        """Write all bytes, or note why not."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                written = super().write(view[done:])
                if written is None:  # a terminal that another program made non-blocking
                    select.select((), (self,), ())
                done += written or 0
        except OSError as error:
            self.failure = error
        return len(view)


def make_screen_safe() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr``; call it before anything keeps the old ones.

    Characters that the encoding does not have are written as ``\\uXXXX``.  Streams that are not
    Python's own, as in a notebook, stay.
    """
    for descriptor in range(3):
        with suppress(OSError):
            if not _is_open(descriptor):  # else the next file that is opened would be the screen
                os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or _is_plain(stream, descriptor):
            setattr(sys, name, _forgiving(stream, descriptor))


def screen_failure() -> OSError | None:
    """Why a part of the standard output is not written; None if all is, or nobody reads it.

    A pipe whose reader has ended, such as ``| head``, has been read as far as it was wanted.
    """
    with suppress(OSError):
        sys.stdout.flush()
    file = _raw(sys.stdout) if isinstance(sys.stdout, io.TextIOWrapper) else None
    failure = file.failure if isinstance(file, ForgivingFile) else None
    return None if failure is None or failure.errno == errno.EPIPE else failure


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _is_plain(stream: object, descriptor: int) -> bool:
    """Whether this is the stream that Python opened over the descriptor."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(_raw(stream), ForgivingFile):
        return False
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _raw(stream: io.TextIOWrapper) -> object:
    return getattr(stream.buffer, "raw", stream.buffer)


def _forgiving(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
    # Without a stream the descriptor was closed when Python began; it may be another file by now.
    file = ForgivingFile(descriptor if stream is not None else os.devnull, "wb", stream is None)
    is_direct = stream is not None and stream.write_through  # python -u
    return io.TextIOWrapper(
        file if is_direct else io.BufferedWriter(file),  # type: ignore[arg-type]
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",
        newline="\n",
        line_buffering=stream is None or stream.line_buffering,
        write_through=is_direct,
    )
