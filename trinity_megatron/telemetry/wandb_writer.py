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
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trinity_megatron.telemetry import wandb_run
from trinity_megatron.telemetry.row_journal import RowJournal
from trinity_megatron.telemetry.wandb_file import last_history_step
from trinity_megatron.telemetry.wandb_run import WandbUnavailableError, import_wandb

logger = logging.getLogger(__name__)

_SECONDS_AFTER_FAILURE = 10.0  # a training that failed is not kept from its restart by an upload
_SECONDS_TO_CLOSE_OFFLINE = 30.0
_SECONDS_BESIDE_UPLOAD = 15.0
_SECONDS_TO_ABANDON = 5.0
_POLL_SECONDS = 0.5
_CAPACITY = 100_000  # calls that may wait


def open_writer(args: argparse.Namespace) -> "WandbWriter | None":
    """Megatron's W&B writer; None where Megatron has none, and with WANDB_MODE=disabled."""
    is_here = args.wandb_project and args.rank == args.world_size - 1
    return WandbWriter(args) if is_here and os.environ.get("WANDB_MODE") != "disabled" else None


class ArtifactRequest:
    """The calls of a ``wandb.Artifact``, to be made in the writer's thread.

    The real one copies files: on a full disk that would end the training in a checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.make = methodcaller("Artifact", *args, **kwargs)
        self.calls: list[methodcaller] = []

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append(methodcaller(method, *args, **kwargs))


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
        os.environ.update({**wandb_run.ENVIRONMENT, **os.environ})
        self.run = self.config = self
        self.is_on, self.url = True, None
        self.entity, self.project = args.wandb_entity or "", args.wandb_project
        self._args, self._folder = args, wandb_run.find_folder(args)
        # Appending is atomic and wakes no thread.
        self._values: deque[tuple[int, dict[str, Any]]] = deque()  # of a step
        self._calls: deque[Callable[[], None]] = deque()  # some for each checkpoint
        self._step = self._exit_code = 0
        self._wake = threading.Event()
        self._is_held = self._is_closed = self._is_abandoned = self._is_full = False
        self._thread = threading.Thread(target=self._work, name="wandb-writer", daemon=True)
        # Of the thread.
        self._run: Any = None  # wandb.Run
        self._journal: RowJournal | None = None  # once its rows of the run before are sent
        self._last_step = self._sent_step = -1  # of the run before, and now
        self._has_artifact_failed = False

    # What the training calls: none of it waits for W&B, but finish().

    def start(self) -> None:
        """Start the run, in the background; until then nothing of it is to be seen."""
        if self._thread.ident is None and not self._is_closed:
            self._thread.start()

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Take the values of a step, the current one if None; later values of a name win."""
        if not self.is_on:
            return
        self.start()
        self._step = self._step if step is None else int(step)
        if len(self._values) < _CAPACITY:
            self._values.append((self._step, {n: _plain(value) for n, value in values.items()}))
        elif not self._is_full:
            self._is_full = True
            self._say(
                f"W&B does not keep up: {_CAPACITY} values wait, further ones are dropped "
                f"(from step {self._step}); the training goes on. TensorBoard has all of them."
            )

    def log_image(self, name: str, pixels: np.ndarray, step: int | None = None) -> None:
        """Log a picture, uint8 ``[height, width, channels]``; it is copied."""
        self.log({name: np.array(pixels, dtype=np.uint8)}, step)

    def update(self, values: Mapping[str, Any], **_: Any) -> None:
        """Update the configuration; after a resume it may differ."""
        taken = dict(values)
        self._calls.append(lambda: self._run.config.update(taken, allow_val_change=True))

    def log_artifact(
        self, artifact: ArtifactRequest, aliases: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Record a checkpoint; a failure is said once and stops no metrics."""
        self._calls.append(lambda: self._log_artifact(artifact, aliases))
        self._wake.set()  # the steps before a checkpoint are not trained again: write them now

    def use_artifact(self, *_: Any, **__: Any) -> None:
        """Do nothing: it would wait for an answer of the server, and offline it raises."""

    def finish(self, exit_code: int | None = None, **_: Any) -> None:
        """Send what is left and end the run, in bounded time; inside :meth:`kept_open` do nothing.

        Megatron calls it at the end of ``pretrain()``.
        """
        if self._is_held or self._is_closed:
            return
        self.is_on, self._is_closed, self._exit_code = False, True, exit_code or 0
        self._wake.set()
        if self._thread.ident is None:
            return
        self._thread.join(seconds := self._seconds_to_close())
        if self._thread.is_alive():
            self._say(f"W&B did not finish within {seconds:.0f} s. {self._remains()}")
            self._is_abandoned = True
            # Ends what the thread waits for, and wandb's exit hook, which has no time limit.
            threading.Thread(target=wandb_run.teardown, daemon=True).start()
            self._thread.join(_SECONDS_TO_ABANDON)

    @contextlib.contextmanager
    def kept_open(self) -> Iterator["WandbWriter"]:
        """Let the run live until the end of the block, for what comes after ``pretrain()``."""
        self._is_held, exit_code = True, 1
        try:
            yield self
            exit_code = 0
        except SystemExit as stop:
            exit_code = int(bool(stop.code))
            raise
        finally:
            self._is_held = False
            self.finish(exit_code)

    def __getattr__(self, name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(f"The guarded W&B writer has no {name!r}.")
        return getattr(import_wandb(), name)  # a data type, for example Histogram

    def __eq__(self, other: object) -> bool:
        # Megatron's timers know a W&B writer by ``writer == wandb``.
        return other is self or other is sys.modules.get("wandb", self)

    def _seconds_to_close(self) -> float:
        if self._exit_code:
            return _SECONDS_AFTER_FAILURE
        if self._run is not None and self._run.offline:
            return _SECONDS_TO_CLOSE_OFFLINE
        return _SECONDS_BESIDE_UPLOAD + float(os.environ["WANDB_FINISH_TIMEOUT"])

    def _say(self, message: str) -> None:
        if not self._is_abandoned:
            logger.warning(message)

    def _remains(self) -> str:
        """Where the data is and what the user can do with it."""
        where = f" in {self._args.tensorboard_dir}" if self._args.tensorboard_dir else ""
        metrics = f"TensorBoard has all metrics{where}."
        if self._run is None or not Path(self._run.settings.sync_file).exists():
            return metrics
        command = wandb_run.sync_command(self._run)
        return f"What was written until then is kept: {command} sends it. {metrics}"

    # What runs in the thread.

    def _work(self) -> None:
        try:
            self._open()
            is_last = False
            while not is_last:
                self._wake.wait(_POLL_SECONDS)
                self._wake.clear()
                is_last = self._is_closed
                self._drain()
            self._end()
        except BaseException as error:  # wandb raises SystemExit, too
            self.is_on = False
            self._values.clear()
            what = str(error) if isinstance(error, WandbUnavailableError) else _describe(error)
            state = "has not all of this run" if self._is_closed else "is off; the training goes on"
            if what:
                self._say(f"W&B {state}. {what} {self._remains()}")
            with contextlib.suppress(BaseException):  # of no run, too
                self._run.finish(exit_code=1)
        finally:
            wandb_run.teardown()

    def _open(self) -> None:
        if import_wandb().setup().settings.mode == "disabled":
            raise WandbUnavailableError("")
        folders = [Path(path) for path in (self._args.save, self._args.out) if path]
        run_id = os.environ.get("WANDB_RUN_ID") or wandb_run.find_or_make_id(folders)
        files = wandb_run.find_files(self._folder, run_id)
        self._run, reason = wandb_run.open_run(self._args, run_id, lambda: self._is_abandoned)
        if reason:
            command = wandb_run.sync_command(self._run)
            logger.warning("%s: this run is kept offline; %s sends it later.", reason, command)
        self.entity, self.url = self._run.entity or self.entity, self._run.url
        # The server knows: what an outage kept from it is sent again.
        known = max(map(last_history_step, files), default=-1)
        self._last_step = known if self._run.offline else self._run.starting_step - 1

    def _drain(self) -> None:
        """Hand over all that waits, one row a step."""
        num_calls, rows = len(self._calls), dict[int, dict[str, Any]]()
        for _ in range(len(self._values)):
            step, values = self._values.popleft()
            rows.setdefault(step, {}).update(values)
        if not Path(self._run.sync_dir).is_dir():  # what wandb does not report
            raise WandbUnavailableError(f"{self._run.sync_dir} was removed during the run.")
        wandb_run.check_folder(self._folder)
        if rows:
            self._write(rows)
        for _ in range(num_calls):
            self._calls.popleft()()

    def _write(self, rows: dict[int, dict[str, Any]]) -> None:
        with wandb_run.named_if_unwritable(self._folder):
            if self._journal is None:
                file = self._folder / "wandb" / f"journal-{self._run.id}.jsonl"
                self._journal = RowJournal(file)
                rows = {**self._find_lost(self._journal.rows, min(rows)), **rows}
            self._journal.append(rows)
        image = import_wandb().Image
        for step, row in sorted(rows.items()):
            if step > self._last_step:
                values = {n: image(v) if isinstance(v, np.ndarray) else v for n, v in row.items()}
                self._run.log(values, step=step)
                self._sent_step = step

    def _find_lost(self, rows: dict[int, dict[str, Any]], first: int) -> dict[int, dict[str, Any]]:
        """What a kill took from wandb: rows between its last step and the first of this run."""
        last = self._last_step
        if first <= last:
            self._say(
                f"W&B has the steps up to {last} of this run: steps {first} to {last}, which are "
                "trained again, are not sent again."
            )
        return {step: row for step, row in rows.items() if last < step < first}

    def _log_artifact(self, artifact: ArtifactRequest, aliases: Sequence[str] | None) -> None:
        if self._has_artifact_failed:
            return
        try:
            made = artifact.make(import_wandb())
            for call in artifact.calls:
                call(made)
            self._run.log_artifact(made, aliases=aliases)
        except Exception as error:
            self._has_artifact_failed = True
            self._say(
                f"W&B gets no artifacts of this run's checkpoints: {_describe(error)} "
                "The checkpoints themselves are not concerned."
            )

    def _end(self) -> None:
        """Finish the run and find what wandb does not report: steps that it did not write."""
        settings = self._run.settings
        try:
            self._run.finish(exit_code=self._exit_code)
        except TimeoutError:
            limit = float(os.environ["WANDB_FINISH_TIMEOUT"])
            server = wandb_run.without_password(settings.base_url)
            raise WandbUnavailableError(
                f"{server} did not take all data within {limit:.0f} s."
            ) from None
        wandb_run.teardown()  # writes what is left
        if (written := last_history_step(Path(settings.sync_file))) < self._sent_step:
            raise WandbUnavailableError(
                f"{settings.sync_file} holds the steps up to {written}, but {self._sent_step} were "
                "logged: the folder could not be written."
            )


def _plain(value: Any) -> Any:
    """A value that later steps of the training cannot change."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.detach().clone()
    return value.item() if isinstance(value, np.generic) else value


def _describe(error: BaseException) -> str:
    name, line = type(error).__name__, wandb_run.first_line(error)
    return f"{name}." if line == name else f"{name}: {line}."
