"""TensorBoard's event files of a run that goes on when they cannot be written."""

from typing import Any

from tensorboard.summary.writer.record_writer import RecordWriter

from trinity_megatron.process.screen import tell


class ForgivingRecordWriter(RecordWriter):
    """Writes records until that fails, which is said once.

    The error would reach the training from the thread that writes, at some later step.  A record
    after a torn one cannot be read, so the file ends there; the next start begins another.

    Args:
        writer: The file.
    """

    def __init__(self, writer: Any) -> None:
        super().__init__(writer)
        self._file = writer
        self._has_failed = False

    def write(self, data: bytes) -> None:
        """Write a record."""
        self._unless_failed(super().write, data)

    def flush(self) -> None:
        """Hand what is written to the operating system."""
        self._unless_failed(super().flush)

    def close(self) -> None:
        """End the file."""
        self._unless_failed(super().close)

    def _unless_failed(self, call: Any, *given: Any) -> None:
        if self._has_failed:
            return
        try:
            call(*given)
        except OSError as error:
            self._has_failed = True
            name = getattr(self._file, "filename", "its event file")
            tell(
                f"WARNING: TensorBoard: {name} cannot be written: {error.strerror or error}. The "
                "training goes on; what follows is in no report until the next start.",
                is_error=True,
            )
