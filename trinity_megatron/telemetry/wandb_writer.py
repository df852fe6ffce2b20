"""The writer that Megatron logs to as W&B: it can neither stop nor slow a training.

Calls only put their content on a bounded queue.  One thread merges what belongs to a step, keeps a
journal of it, and hands it to wandb; whatever fails there switches the writer off and is said once.
"""

import argparse
import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trinity_megatron.telemetry.row_journal import RowJournal
from trinity_megatron.telemetry.wandb_file import last_history_step
from trinity_megatron.telemetry.wandb_run import (
    ENVIRONMENT,
    WandbUnavailableError,
    check_folder,
    find_files,
    find_folder,
    find_or_make_id,
    first_line,
    import_wandb,
    start_run,
    teardown,
    unwritable,
    why_offline,
    without_password,
)

logger = logging.getLogger(__name__)

# A training that failed is not kept from its restart by an upload.
_SECONDS_AFTER_FAILURE = 10.0
_SECONDS_TO_CLOSE_OFFLINE = 30.0
_SECONDS_BESIDE_UPLOAD = 15.0
_SECONDS_TO_ABANDON = 5.0
_POLL_SECONDS = 0.5
_CAPACITY = 100_000  # calls that may wait


def open_writer(args: argparse.Namespace) -> "WandbWriter | None":
    """Megatron's W&B writer; its ``start()`` starts the run.

    Args:
        args: Megatron's arguments, and ``out``.

    Returns:
        None where Megatron has none (not the last rank, no project), and with WANDB_MODE=disabled.
    """
    if not args.wandb_project or args.rank != args.world_size - 1:
        return None
    return None if os.environ.get("WANDB_MODE") == "disabled" else WandbWriter(args)


class ArtifactRequest:
    """A ``wandb.Artifact`` to be made in the writer's thread.

    The real one copies files: on a full disk that would end the training in a checkpoint.

    Attributes:
        calls: Method, positional and keyword arguments; the constructor's first.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[tuple[str, Any, Any]] = [("Artifact", args, kwargs)]

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((method, args, kwargs))


class WandbWriter:
    """What ``megatron.training.get_wandb_writer()`` returns: wandb, its run, and its config.

    Args:
        args: Megatron's arguments, and ``out``.

    Attributes:
        is_on: Whether values are still taken.
        entity: Owner of the project; empty while unknown.
        project: Name of the project.
        url: Address of the run; None while it is offline or not started.
    """

    Artifact = ArtifactRequest  # called as wandb.Artifact

    def __init__(self, args: argparse.Namespace) -> None:
        self.is_on = True
        self.entity, self.project = args.wandb_entity or "", args.wandb_project
        self.url: str | None = None
        self.run, self.config = self, SimpleNamespace(update=self._update_config)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._args = args
        # A step and its values, or None and a call.  Appending is atomic and wakes no thread.
        self._events: deque[tuple[int | None, Any]] = deque()
        self._step = self._exit_code = 0
        self._wake = threading.Event()
        self._is_held = self._is_closed = self._is_silent = self._is_full = False
        self._has_artifact_failed = False
        self._thread: threading.Thread | None = None
        # Of the thread.
        self._folder, self._id = find_folder(args), ""
        self._run: Any = None  # wandb.Run
        self._file: Path | None = None  # the .wandb file
        self._is_offline = self._has_begun = False
        self._last_step = self._sent_step = -1  # of the run before, and now

    # What the training calls: none of it waits for W&B, but finish().

    def start(self) -> None:
        """Start the run, in the background; until then nothing of it is to be seen."""
        if self._thread is None and not self._is_closed:
            self._thread = threading.Thread(target=self._work, name="wandb-writer", daemon=True)
            self._thread.start()

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Take the values of a step, the current one if None; later values of a name win."""
        if self.is_on:
            self.start()
            self._step = self._step if step is None else int(step)
            self._put(self._step, {name: _plain(value) for name, value in values.items()})

    def log_image(self, name: str, pixels: np.ndarray, step: int | None = None) -> None:
        """Log a picture, uint8 ``[height, width, channels]``; it is copied."""
        self.log({name: np.array(pixels, dtype=np.uint8)}, step)

    def log_artifact(
        self, artifact: ArtifactRequest, aliases: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Record a checkpoint; a failure is said once and stops no metrics."""
        self._put(None, lambda: self._log_artifact(artifact, aliases))
        self._wake.set()  # the steps before a checkpoint are not trained again: write them now

    def use_artifact(self, *_: Any, **__: Any) -> None:
        """Do nothing: it would wait for an answer of the server, and offline it raises."""

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        """Send what is left and end the run, in bounded time; inside :meth:`kept_open` do nothing.

        Megatron calls it at the end of ``pretrain()``.
        """
        if not self._is_held:
            self._close(exit_code or 0, self._seconds_to_close())

    @contextlib.contextmanager
    def kept_open(self) -> Iterator["WandbWriter"]:
        """Let the run live until the end of the block, for what comes after ``pretrain()``."""
        self._is_held = has_failed = True
        try:
            yield self
            has_failed = False
        except SystemExit as stop:
            has_failed = bool(stop.code)
            raise
        finally:
            self._is_held = False
            limit = _SECONDS_AFTER_FAILURE if has_failed else self._seconds_to_close()
            self._close(int(has_failed), limit)

    def __getattr__(self, name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(f"The guarded W&B writer has no {name!r}.")
        return getattr(import_wandb(), name)  # a data type, for example Histogram

    def __eq__(self, other: object) -> bool:
        # Megatron's timers know a W&B writer by ``writer == wandb``.
        return other is self or (other is not None and other is sys.modules.get("wandb"))

    __hash__ = object.__hash__

    def _update_config(self, values: Mapping[str, Any], **_: Any) -> None:
        taken = dict(values)  # after a resume they may differ
        self._put(None, lambda: self._run.config.update(taken, allow_val_change=True))

    def _put(self, step: int | None, content: Any) -> None:
        if not self.is_on:
            return
        if len(self._events) < _CAPACITY:
            self._events.append((step, content))
        elif not self._is_full:
            self._is_full = True
            self._say(
                f"W&B does not keep up: {_CAPACITY} values wait, further ones are dropped "
                f"(from step {self._step}); the training goes on. TensorBoard has all of them."
            )

    def _seconds_to_close(self) -> float:
        if self._is_offline:
            return _SECONDS_TO_CLOSE_OFFLINE
        return _SECONDS_BESIDE_UPLOAD + float(os.environ["WANDB_FINISH_TIMEOUT"])

    def _close(self, exit_code: int, seconds: float) -> None:
        if self._is_closed:
            return
        self.is_on, self._is_closed, self._exit_code = False, True, exit_code
        self._wake.set()
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"W&B did not finish within {seconds:.0f} s. {self._remains()}")
            self._is_silent = True
            # Ends what the thread waits for, and wandb's exit hook, which has no time limit.
            threading.Thread(target=teardown, daemon=True).start()
            self._thread.join(_SECONDS_TO_ABANDON)

    def _say(self, message: str) -> None:
        if not self._is_silent:
            logger.warning(message)

    def _remains(self) -> str:
        """Where the data is and what the user can do with it."""
        where = f" in {self._args.tensorboard_dir}" if self._args.tensorboard_dir else ""
        metrics = f"TensorBoard has all metrics{where}."
        if self._file is None or not self._file.exists():
            return metrics
        return f"What was written until then is kept: {self._sync_command()} sends it. {metrics}"

    def _sync_command(self) -> str:
        if self._is_offline:  # all parts of the run, in their order
            return f"`wandb sync {self._folder}/wandb/offline-run-*-{self._id}`"
        assert self._file is not None
        return f"`wandb sync --include-online {self._file.parent}`"

    # What runs in the thread.

    def _work(self) -> None:
        try:
            self._open()
            journal = RowJournal(self._folder / "wandb" / f"journal-{self._id}.jsonl")
            is_last = False
            while not is_last:
                self._wake.wait(_POLL_SECONDS)
                self._wake.clear()
                is_last = self._is_closed
                self._drain(journal)
            self._end()
        except BaseException as error:  # wandb raises SystemExit, too
            self._switch_off(error)
            with contextlib.suppress(BaseException):
                if self._run is not None:
                    self._run.finish(exit_code=1)
        finally:
            teardown()

    def _open(self) -> None:
        wandb = import_wandb()
        check_folder(self._folder)
        folders = [Path(path) for path in (self._args.save, self._args.out) if path]
        self._id = os.environ.get("WANDB_RUN_ID") or find_or_make_id(folders)
        if wandb.setup().settings.mode == "disabled":
            raise WandbUnavailableError("")
        files = find_files(self._folder, self._id)
        reason = why_offline(files)
        if reason is None:
            try:
                self._run = start_run(self._args, self._folder, self._id, None)
            except Exception as error:
                if self._is_silent:  # given up
                    raise
                reason = f"The W&B server did not start the run ({first_line(error)})"
                teardown()  # it holds the id
        if self._run is None:
            self._is_offline = True
            self._run = start_run(self._args, self._folder, self._id, "offline")
        if reason:
            command = self._sync_command()
            logger.warning("%s: this run is kept offline; %s sends it later.", reason, command)
        self._file = Path(self._run.settings.sync_file)
        self.entity, self.url = self._run.entity or self.entity, self._run.url
        # The server knows: what an outage kept from it is sent again.
        known = max(map(last_history_step, files), default=-1)
        self._last_step = known if self._is_offline else self._run.starting_step - 1

    def _drain(self, journal: RowJournal) -> None:
        """Hand over all that waits, one row a step."""
        rows: dict[int, dict[str, Any]] = {}
        calls: list[Callable[[], None]] = []
        for _ in range(len(self._events)):
            step, content = self._events.popleft()
            if step is None:
                calls.append(content)
            else:
                rows.setdefault(step, {}).update(content)
        self._check()
        if rows:
            if not self._has_begun:
                self._begin(journal, min(rows))
            try:
                journal.append(rows)
            except OSError as error:
                raise unwritable(self._folder, error) from None
            for step, row in sorted(rows.items()):
                self._send(step, row)
        for call in calls:
            call()

    def _begin(self, journal: RowJournal, first_step: int) -> None:
        """Send what a kill took from wandb: rows of the journal between its steps and ours."""
        self._has_begun = True
        for step, row in sorted(journal.rows.items()):
            if step < first_step:
                self._send(step, row)
        if first_step <= self._last_step:
            self._say(
                f"W&B has the steps up to {self._last_step} of this run: steps {first_step} to "
                f"{self._last_step}, which are trained again, are not sent again."
            )

    def _send(self, step: int, row: Mapping[str, Any]) -> None:
        if step > self._last_step:
            image = import_wandb().Image
            values = {n: image(v) if isinstance(v, np.ndarray) else v for n, v in row.items()}
            self._run.log(values, step=step)
            self._sent_step = step

    def _log_artifact(self, artifact: ArtifactRequest, aliases: Sequence[str] | None) -> None:
        if self._has_artifact_failed:
            return
        self._check()
        try:
            real: Any = import_wandb()
            for method, args, kwargs in artifact.calls:
                made = getattr(real, method)(*args, **kwargs)
                real = made if method == "Artifact" else real
            self._run.log_artifact(real, aliases=aliases)
        except Exception as error:
            self._has_artifact_failed = True
            self._say(
                f"W&B gets no artifacts of this run's checkpoints: {_describe(error)} "
                "The checkpoints themselves are not concerned."
            )

    def _check(self) -> None:
        """Find what wandb does not report: its folder is gone or full."""
        assert self._file is not None
        if not self._file.parent.is_dir():
            raise WandbUnavailableError(f"{self._file.parent} was removed during the run.")
        check_folder(self._folder)

    def _end(self) -> None:
        """Finish the run and find what wandb does not report: steps that it did not write."""
        assert self._file is not None
        try:
            self._run.finish(exit_code=self._exit_code)
        except TimeoutError:
            limit = float(os.environ["WANDB_FINISH_TIMEOUT"])
            server = without_password(self._run.settings.base_url)
            raise WandbUnavailableError(
                f"{server} did not take all data within {limit:.0f} s."
            ) from None
        teardown()  # writes what is left
        if (written := last_history_step(self._file)) < self._sent_step:
            raise WandbUnavailableError(
                f"{self._file} holds the steps up to {written}, but {self._sent_step} were "
                "logged: the folder could not be written."
            )

    def _switch_off(self, error: BaseException) -> None:
        self.is_on = False
        self._events.clear()
        what = str(error) if isinstance(error, WandbUnavailableError) else _describe(error)
        state = "has not all of this run" if self._is_closed else "is off; the training goes on"
        if what:
            self._say(f"W&B {state}. {what} {self._remains()}")


def _plain(value: Any) -> Any:
    """A value that later steps of the training cannot change."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.detach().clone()
    return value.item() if isinstance(value, np.generic) else value


def _describe(error: BaseException) -> str:
    name, line = type(error).__name__, first_line(error)
    return f"{name}." if line == name else f"{name}: {line}."
