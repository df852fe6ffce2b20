"""Sending documents through datatrove's steps, stage by stage, as tasks of an engine."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trinity_megatron.data.cluster.engines import Engine, datatrove_class
from trinity_megatron.data.cluster.steps import StepFile, make_minhash
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import read_json

logger = logging.getLogger(__name__)
DOCUMENTS_NAME, SETTINGS_NAME = "documents", "filter.json"
_STAGES_NAME = "stages"


def filter_documents(out: Path, steps: StepFile, engine: Engine, *, num_tasks: int) -> Path:
    """Write the documents that are left, or go on with it.

    Args:
        out: Folder to write; all machines must see it.
        steps: What the documents are read by and go through.
        engine: Where the tasks run.
        num_tasks: Tasks of a stage, which share its files.

    Returns:
        The folder with the documents: JSON Lines, compressed, a file for each task.

    Raises:
        UserError: A step or the engine cannot be used, tasks have failed, or the folder is of
            other steps.
    """
    engine.check()
    steps.check()
    for what in steps.downloads():
        logger.warning("downloads when it runs: %s", what)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            _keep_settings(out, steps, num_tasks)
            _run_stages(out, steps, engine, num_tasks)
    except Timeout:
        raise UserError(f"another process filters in --out {out}. Remedy: wait for it.") from None
    return out / DOCUMENTS_NAME


def _run_stages(out: Path, steps: StepFile, engine: Engine, num_tasks: int) -> None:
    documents = out / DOCUMENTS_NAME
    if documents.is_dir():
        return
    stages = steps.stages()
    read: Any = steps.reader.make
    for number, (dedup, further) in enumerate(stages):
        folder = out / _STAGES_NAME / f"{number}"
        own = [step.make() for step in further]
        if dedup is not None:
            minhash = make_minhash(dedup, folder)
            engine.run([read(), minhash.signature], num_tasks, folder / "tasks-signature")
            engine.run([minhash.buckets], minhash.num_buckets, folder / "tasks-buckets")
            engine.run([minhash.cluster], 1, folder / "tasks-cluster")
            own.insert(0, minhash.keep)
        written = folder / DOCUMENTS_NAME
        engine.run([read(), *own, _make_writer(written)], num_tasks, folder / "tasks-write")
        written.mkdir(exist_ok=True)  # no document may be left
        read = _Reader(written)
    if not any(written.iterdir()):
        raise UserError("no document is left after these steps. Remedy: look at the steps.")
    os.replace(written, documents)
    shutil.rmtree(out / _STAGES_NAME)


class _Reader:
    """Makes readers of what a stage has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> Any:
        return datatrove_class("datatrove.pipeline.readers", "JsonlReader")(str(self.folder))


def _make_writer(folder: Path) -> Any:
    # A task that runs again writes the same file again.
    return datatrove_class("datatrove.pipeline.writers", "JsonlWriter")(
        str(folder), output_filename="${rank}.jsonl.gz"
    )


def _keep_settings(out: Path, steps: StepFile, num_tasks: int) -> None:
    """Write what decides the documents, or compare it with what is there."""
    content = {
        "reader": [steps.reader.name, steps.reader.arguments],
        "steps": [[step.name, step.arguments] for step in steps.steps],
        "tasks": num_tasks,
    }
    path = out / SETTINGS_NAME
    if path.is_file():
        if read_json(path) != content:
            raise UserError(
                f"--out {out} is of other steps or another --tasks (see {path}). Remedy: the same, "
                "or another --out."
            )
        return
    others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]
    if others:
        raise UserError(
            f"--out {out} holds other files ({', '.join(sorted(others)[:3])}). Remedy: a new "
            "folder."
        )
    temporary = out / f".{SETTINGS_NAME}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
