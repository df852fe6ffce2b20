"""The writer that Megatron logs to as W&B: it can neither stop nor slow a training.

Calls only put their content on a bounded queue.  One thread merges what belongs to a step, keeps a
journal of it, and hands it to the run behind it; whatever fails there switches the writer off and
is said once.  The wandb package itself stays behind :class:`WandbBackend`.
"""

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

logger = logging.getLogger(__name__)

# A training that failed is not kept from its restart by an upload.
_SECONDS_AFTER_FAILURE = 10.0
_SECONDS_AFTER_KILL = 5.0


class WandbUnavailableError(RuntimeError):
    """W&B cannot be used; says why, and the remedy."""


@dataclass(frozen=True)
class Picture:
    """A picture to log.

    Attributes:
        pixels: uint8 ``[height, width, channels]``.
    """

    pixels: np.ndarray


@dataclass
class ArtifactRequest:
    """What ``wandb.Artifact`` is asked for, to be asked again in the writer's thread.

    The real one copies files: on a full disk that would end the training in a checkpoint.

    Attributes:
        calls: Method, positional and keyword arguments, in order.
    """

    name: str
    type: str
    metadata: dict[str, Any] | None = None
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def add_reference(self, *args: Any, **kwargs: Any) -> None:
        """Note the call."""
        self.calls.append(("add_reference", args, kwargs))

    def add_file(self, *args: Any, **kwargs: Any) -> None:
        """Note the call."""
        self.calls.append(("add_file", args, kwargs))


class WandbBackend(Protocol):
    """The run behind the writer; every method may block or raise, and runs in its thread."""

    entity: str
    project: str
    url: str | None

    @property
    def journal(self) -> Path:
        """File for the latest rows; known once the run is open."""
        ...

    @property
    def close_seconds(self) -> float:
        """Time that :meth:`close` may take."""
        ...

    def prepare(self) -> None:
        """Do what needs no server, and start what :meth:`kill` ends."""
        ...

    def open(self) -> int:
        """Start or continue the run; return the last step that W&B has, -1 if it has none."""
        ...

    def log(self, row: dict[str, Any], step: int) -> None:
        """Add to the row of a step; steps do not decrease."""
        ...

    def update_config(self, values: dict[str, Any]) -> None:
        """Add to the configuration."""
        ...

    def log_artifact(self, artifact: ArtifactRequest, aliases: Sequence[str] | None) -> None:
        """Record a checkpoint."""
        ...

    def get_type(self, name: str) -> Any:
        """A data type of wandb, for example ``Histogram``."""
        ...

    def check(self) -> None:
        """Raise if what is logged can no longer be kept."""
        ...

    def close(self, exit_code: int) -> None:
        """Finish the run; a second call does nothing."""
        ...

    def kill(self) -> None:
        """End what :meth:`close` is waiting for; called from another thread."""
        ...

    def remains(self) -> str:
        """Where the data is and what the user can do with it."""
        ...


class WandbWriter:
    """What ``megatron.training.get_wandb_writer()`` returns.

    Args:
        backend: The run.
        capacity: Calls that may wait; more are dropped.
        poll_seconds: Rhythm of the thread.

    Attributes:
        scalar_keys: Names of all numbers that were sent.
        config: Has ``update()``.
        run: Has ``log_artifact()``, ``entity`` and the like.
    """

    def __init__(
        self, backend: WandbBackend, *, capacity: int = 100_000, poll_seconds: float = 0.5
    ) -> None:
        self.scalar_keys: set[str] = set()
        self.config, self.run = _Config(self), _Run(self)
        self._backend = backend
        self._capacity, self._poll_seconds = capacity, poll_seconds
        # A step and its values, or None and a call.  Appending is atomic and wakes no thread.
        self._events: deque[tuple[int | None, Any]] = deque()
        self._step = 0
        self._exit_code = 0
        self._wake = threading.Event()
        self._is_on, self._is_held, self._is_closed = True, False, False
        self._is_silent = self._is_full = self._has_artifact_failed = False
        self._journal: _Journal | None = None
        self._last_step = -1
        self._has_begun = False
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None

    # What the training calls: none of it waits for W&B, but finish().

    def start(self) -> None:
        """Start the run, in the background; until then nothing of it is to be seen."""
        if self._thread is None and not self._is_closed:
            self._thread = threading.Thread(target=self._work, name="wandb-writer", daemon=True)
            self._thread.start()

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Take the values of a step, the current one if None; later values of a name win."""
        if not self._is_on or self._is_closed:
            return
        self.start()
        self._step = self._step if step is None else int(step)
        self._put(self._step, {name: _plain(value) for name, value in values.items()})

    def log_image(self, name: str, pixels: np.ndarray, step: int | None = None) -> None:
        """Log a picture, uint8 ``[height, width, channels]``; it is copied."""
        self.log({name: Picture(np.array(pixels, dtype=np.uint8))}, step)

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        """Send what is left and end the run, in bounded time; inside :meth:`kept_open` do nothing.

        Megatron calls it at the end of ``pretrain()``.
        """
        if not self._is_held:
            self._close(exit_code or 0)

    @contextlib.contextmanager
    def kept_open(self) -> Iterator["WandbWriter"]:
        """Let the run live until the end of the block, for what comes after ``pretrain()``."""
        self._is_held = True
        seconds: float | None = _SECONDS_AFTER_FAILURE
        exit_code = 1
        try:
            yield self
            exit_code, seconds = 0, None
        except SystemExit as stop:
            if not stop.code:
                exit_code, seconds = 0, None
            raise
        finally:
            self._is_held = False
            self._close(exit_code, seconds=seconds)

    @property
    def url(self) -> str | None:
        """Address of the run; None while it is offline or not started."""
        return self._backend.url

    @property
    def is_on(self) -> bool:
        """Whether values are still taken."""
        return self._is_on and not self._is_closed

    Artifact = ArtifactRequest  # called as wandb.Artifact

    def __getattr__(self, name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(f"The guarded W&B writer has no {name!r}.")
        return self._backend.get_type(name)

    def __eq__(self, other: object) -> bool:
        # Megatron's timers know a W&B writer by ``writer == wandb``.
        return other is self or (other is not None and other is sys.modules.get("wandb"))

    __hash__ = object.__hash__

    def _put(self, step: int | None, content: Any) -> None:
        if not self._is_on:
            return
        if len(self._events) < self._capacity:
            self._events.append((step, content))
        elif not self._is_full:
            self._is_full = True
            self._say(
                f"W&B does not keep up: {self._capacity} values wait, further ones are dropped "
                f"(from step {self._step}); the training goes on. TensorBoard has all of them."
            )

    def _close(self, exit_code: int, *, seconds: float | None = None) -> None:
        if self._is_closed or os.getpid() != self._pid:  # a forked child has no thread
            return
        self._is_closed, self._exit_code = True, exit_code
        self._wake.set()
        atexit.unregister(self._at_exit)
        if self._thread is None:
            return
        seconds = self._backend.close_seconds if seconds is None else seconds
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"W&B did not finish within {seconds:.0f} s. {self._backend.remains()}")
            self._is_silent = True
            self._backend.kill()
            self._thread.join(_SECONDS_AFTER_KILL)

    def _at_exit(self) -> None:
        self._is_silent = True  # whatever ended the training has been said
        self._close(1, seconds=_SECONDS_AFTER_FAILURE)

    def _say(self, message: str) -> None:
        if not self._is_silent:
            logger.warning(message)

    # What runs in the thread.

    def _work(self) -> None:
        try:
            self._backend.prepare()
            # After wandb's own hook, so that it comes before: that one waits without end.
            atexit.register(self._at_exit)
            self._last_step = self._backend.open()
            self._journal = _Journal(self._backend.journal)
            while not self._is_closed:
                self._wake.wait(self._poll_seconds)
                self._wake.clear()
                self._drain()
            self._drain()
            self._backend.close(self._exit_code)
        except BaseException as error:  # wandb raises SystemExit too
            self._switch_off(error)
            with contextlib.suppress(BaseException):
                self._backend.close(1)

    def _drain(self) -> None:
        """Hand over all that waits, one row a step; W&B itself merges rows of the same step."""
        rows: dict[int, dict[str, Any]] = {}
        calls: list[Callable[[], None]] = []
        for _ in range(len(self._events)):
            step, content = self._events.popleft()
            if step is None:
                calls.append(content)
            else:
                rows.setdefault(step, {}).update(content)
        if rows:
            self._send(rows)
        for call in calls:
            call()
        self._backend.check()

    def _send(self, rows: dict[int, dict[str, Any]]) -> None:
        assert self._journal is not None
        if not self._has_begun:
            self._begin(min(rows))
        self._journal.append(rows)
        for step, row in sorted(rows.items()):
            self.scalar_keys.update(name for name, v in row.items() if isinstance(v, int | float))
            if step > self._last_step:
                self._backend.log(row, step)

    def _begin(self, first_step: int) -> None:
        """Close the gap to the training before: W&B's files lag behind when it is killed."""
        assert self._journal is not None
        self._has_begun = True
        for step, row in sorted(self._journal.read().items()):
            if self._last_step < step < first_step:
                self._backend.log(row, step)
        if first_step <= self._last_step:
            self._say(
                f"W&B has the steps up to {self._last_step} of this run: steps {first_step} to "
                f"{self._last_step}, which are trained again, are not sent again."
            )

    def _switch_off(self, error: BaseException) -> None:
        self._is_on = False
        self._events.clear()
        what = str(error) if isinstance(error, WandbUnavailableError) else _describe(error)
        state = "has not all of this run" if self._is_closed else "is off; the training goes on"
        if what:
            self._say(f"W&B {state}. {what} {self._backend.remains()}")

    def _log_artifact(self, artifact: ArtifactRequest, aliases: Sequence[str] | None) -> None:
        if self._has_artifact_failed:
            return
        self._backend.check()
        try:
            self._backend.log_artifact(artifact, aliases)
        except Exception as error:
            self._has_artifact_failed = True
            self._say(
                f"W&B gets no artifacts of this run's checkpoints: {_describe(error)} "
                "The checkpoints themselves are not concerned."
            )


class _Config:
    """``wandb.config`` as far as Megatron uses it."""

    def __init__(self, writer: WandbWriter) -> None:
        self._writer = writer

    def update(self, values: Mapping[str, Any], **_: Any) -> None:
        """Add to the configuration."""
        taken, writer = dict(values), self._writer
        writer._put(None, lambda: writer._backend.update_config(taken))


class _Run:
    """``wandb.run`` as far as Megatron uses it."""

    def __init__(self, writer: WandbWriter) -> None:
        self._writer = writer

    @property
    def entity(self) -> str:
        """Owner of the project; empty while unknown."""
        return self._writer._backend.entity

    @property
    def project(self) -> str:
        """Name of the project."""
        return self._writer._backend.project

    def log_artifact(
        self, artifact: ArtifactRequest, aliases: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Record a checkpoint; a failure is said once and stops no metrics."""
        writer = self._writer
        writer._put(None, lambda: writer._log_artifact(artifact, aliases))
        writer._wake.set()  # the steps before a checkpoint are not trained again: write them now

    def use_artifact(self, *_: Any, **__: Any) -> None:
        """Do nothing: it would wait for an answer of the server, and offline it raises."""


class _Journal:
    """The latest rows of a run in a file that survives a kill, one JSON object a line.

    wandb's process dies with the training and takes along what it has not written, up to 15 s.
    Writing here is also the test whether the folder can still be written.
    """

    def __init__(self, path: Path, *, keep: int = 500) -> None:
        self._path, self._keep = path, keep
        self._latest: deque[str] = deque(maxlen=keep)
        if path.exists():
            self._latest.extend(path.read_text(errors="replace").splitlines(keepends=True))
        self._num_lines = len(self._latest)

    def read(self) -> dict[int, dict[str, Any]]:
        """The rows by step; a line that was cut by a kill is left out."""
        rows: dict[int, dict[str, Any]] = {}
        for line in self._latest:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                rows.setdefault(entry["step"], {}).update(entry["values"])
        return rows

    def append(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Add rows or parts of them.

        Raises:
            WandbUnavailableError: The file cannot be written.
        """
        lines = []
        for step, row in sorted(rows.items()):
            values = {n: v for n, v in row.items() if isinstance(v, int | float | str)}
            lines.append(json.dumps({"step": step, "values": values}) + "\n")
        self._latest.extend(lines)
        self._num_lines += len(lines)
        try:
            self._write(lines)
        except OSError as error:
            folder = self._path.parent
            raise WandbUnavailableError(
                f"Its folder {folder} cannot be written any more ({error.strerror or error})."
            ) from None

    def _write(self, lines: list[str]) -> None:
        if self._num_lines <= 2 * self._keep:
            with self._path.open("a") as file:
                file.writelines(lines)
            return
        shorter = self._path.with_suffix(".new")
        with shorter.open("w") as file:
            file.writelines(self._latest)
        shorter.replace(self._path)
        self._num_lines = len(self._latest)


def _plain(value: Any) -> Any:
    """A value that later steps of the training cannot change."""
    if type(value) is float:
        return value
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.detach().clone()
    return value.item() if isinstance(value, np.generic) else value


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(".: ") + "."


def call_quietly(function: Callable[[], object]) -> None:
    """Call what may raise anything, SystemExit too, where nothing can be done about it."""
    with contextlib.suppress(BaseException):
        function()
