"""The TensorBoard files of a run that is stopped and resumed: every step is in them once.

TensorBoard forgets what it has read of later steps where it meets the start of a session, so every
start of a run writes one before its first step.  Megatron's scalars over the consumed samples,
whose numbers are no steps, have a folder of their own for that: ``by_samples``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_wandb_writer,
    global_vars,
)
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from trinity_megatron.telemetry.tensorboard_log import RunLog
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.upstream.registry import replaced

BY_SAMPLES = "by_samples"
_SAMPLES_SUFFIX = " vs samples"
_VALIDATION = " validation"


class RunWriter(SummaryWriter):
    """Megatron's TensorBoard writer, for a run that has several starts.

    Args:
        log_dir: ``--tensorboard-dir``.
        **options: Of ``SummaryWriter``.
    """

    def __init__(self, log_dir: str, **options: Any) -> None:
        super().__init__(log_dir, **options)
        self._options = options
        self._by_samples: SummaryWriter | None = None
        self._samples = 0
        self._has_trained = False
        # Validation of the latest step: Megatron evaluates after the last one twice.
        self._held: dict[str, tuple[Any, int]] = {}

    def begin(self, step: int, samples: int) -> None:
        """Have TensorBoard forget what earlier starts wrote of the steps to come.

        Args:
            step: The last step that is done.
            samples: Samples consumed by it.
        """
        self._samples = samples
        _write_session_start(self, step + 1)

    def add_scalar(
        self, tag: str, scalar_value: Any, global_step: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Write a scalar; that of a validation with the next training step or at the end."""
        if _VALIDATION in tag:
            if tag in self._held and self._held[tag][1] != global_step:
                self.release()  # of an earlier step: no training step is logged in between
            self._held[tag] = (scalar_value, global_step)
            return
        self._has_trained = True
        self.release()
        self._write(tag, scalar_value, global_step, *args, **kwargs)

    def add_text(self, tag: str, text_string: str, global_step: Any = None, *args: Any) -> None:
        """Write a text.

        Megatron writes the arguments under the last step of the start before; they are those of the
        next one.
        """
        super().add_text(tag, text_string, (global_step or 0) + 1, *args)

    def latest_validation(self) -> dict[str, float]:
        """Losses of the latest evaluation, by name."""
        return {
            tag: float(value)
            for tag, (value, _) in self._held.items()
            if "ppl" not in tag and not tag.endswith(_SAMPLES_SUFFIX)
        }

    def release(self) -> None:
        """Write the latest validation, unless an earlier start has it of the same step."""
        held, self._held = self._held, {}
        for tag, (value, step) in held.items():
            if self._has_trained or not self._is_written(tag, step):
                self._write(tag, value, step)

    def _is_written(self, tag: str, step: int) -> bool:
        try:
            return step in RunLog(self._folder(tag)).scalars(tag)
        except FileNotFoundError:
            return False

    def end(self) -> None:
        """Write what is held and flush."""
        self.release()
        self.flush()

    def flush(self) -> None:
        """Write to the disk what was added."""
        super().flush()
        if self._by_samples is not None:
            self._by_samples.flush()

    def close(self) -> None:
        """Close the files."""
        super().close()
        if self._by_samples is not None:
            self._by_samples.close()

    def _folder(self, tag: str) -> Path:
        return Path(self.log_dir, BY_SAMPLES if tag.endswith(_SAMPLES_SUFFIX) else "")

    def _write(self, tag: str, *values: Any, **kwargs: Any) -> None:
        if not tag.endswith(_SAMPLES_SUFFIX):
            super().add_scalar(tag, *values, **kwargs)
            return
        if self._by_samples is None:
            self._by_samples = SummaryWriter(str(self._folder(tag)), **self._options)
            _write_session_start(self._by_samples, self._samples + 1)
        self._by_samples.add_scalar(tag, *values, **kwargs)


def _write_session_start(writer: SummaryWriter, step: int) -> None:
    """What ``SummaryWriter(purge_step=step)`` writes, once the step is known."""
    start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
    # TensorBoard takes the first one of a folder for the beginning; earlier releases wrote none.
    for _ in range(2):
        writer._get_file_writer().add_event(start, step)


@contextmanager
def opened_later() -> Iterator[None]:
    """Keep Megatron from opening TensorBoard's files and W&B, while a start may be refused."""
    with (
        replaced("megatron.training.global_vars:_set_tensorboard_writer", lambda _: _open_nothing),
        replaced("megatron.training.global_vars:_set_wandb_writer", lambda _: _open_nothing),
    ):
        yield


def _open_nothing(args: Any) -> None:
    """Leave the writer to the start of the training loop."""


@contextmanager
def recorded() -> Iterator[Callback]:
    """A callback that opens TensorBoard's files and W&B's run; the block closes the former.

    A start that is refused before leaves no trace in either.
    """
    try:
        yield _Opener()
    except BaseException:
        with suppress(Exception):  # the first one is to be seen
            _end()
        raise
    if get_tensorboard_writer() is None:  # without a training loop
        _open_writer()
    _end()


def _end() -> None:
    if isinstance(writer := get_tensorboard_writer(), RunWriter):
        writer.end()


def _open_writer() -> None:
    with replaced("torch.utils.tensorboard:SummaryWriter", lambda _: RunWriter):
        global_vars._set_tensorboard_writer(get_args())


class _Opener(Callback):
    def on_train_start(self) -> None:
        _open_writer()
        args = get_args()
        if isinstance(writer := get_tensorboard_writer(), RunWriter):
            writer.begin(args.iteration, args.consumed_train_samples)
        if wandb_writer := get_wandb_writer():
            wandb_writer.start()
