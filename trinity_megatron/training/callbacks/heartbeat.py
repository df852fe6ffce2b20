"""``heartbeat.json`` in the folder of a run: its step, what is saved, and when that was."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.training.async_utils import is_empty_async_queue

from trinity_megatron.process.heartbeat import HeartbeatFile
from trinity_megatron.training.callbacks.callback import Callback


class HeartbeatWriter(Callback):
    """Writes the file at the beginning of every step; rank 0 has one.

    Args:
        args: Of the run.
        file: Of its folder.
    """

    def __init__(self, args: argparse.Namespace, file: HeartbeatFile) -> None:
        self._args, self._file = args, file
        self._start = self._step = self._saved = 0
        self._saving: int | None = None

    def on_train_start(self) -> None:
        """Say where the run begins."""
        self._start = self._step = self._args.iteration
        self._saved = 0 if self._args.finetune else self._args.iteration
        self._write()

    def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
        """Say that a step begins."""
        self._step = iteration
        self._write()

    def on_checkpoint_save_end(self, iteration: int) -> None:
        """Note the save, which is complete now or later."""
        self._saving = iteration
        self.on_checkpoint_finalize_end()

    def on_checkpoint_finalize_end(self) -> None:
        """Say that a save is complete."""
        if self._saving is not None and is_empty_async_queue():
            self._saved, self._saving = self._saving, None
            self._write()

    def _write(self) -> None:
        self._file.write(start=self._start, step=self._step, saved=self._saved)


@contextmanager
def heartbeat(args: argparse.Namespace) -> Iterator[Callback]:
    """A callback that writes the heartbeat of a run with ``--out``.

    Args:
        args: Of the run.
    """
    if not args.out or args.rank != 0:
        yield Callback()
        return
    file = HeartbeatFile(Path(args.out))
    try:
        yield HeartbeatWriter(args, file)
    finally:
        file.close()
