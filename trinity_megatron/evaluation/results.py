"""Where the results of an evaluation go: the run's folder, its report and its W&B run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trinity_megatron.report.scores import FOLDER_NAME, scalars_of

_CHECKPOINT_OF_ONE_STEP = ".metadata"
_LOCK_NAME = ".lock"  # of a training, see training/pretrain.py


def find_run(out: Path | None, load: Path) -> Path:
    """The folder of the run that results belong to.

    Args:
        out: ``--out``; None: the folder around the checkpoints.
        load: What ``--save`` was, or the folder of one iteration.
    """
    if out is not None:
        return out
    folder = load.absolute()
    if (folder / _CHECKPOINT_OF_ONE_STEP).is_file():
        folder = folder.parent
    return folder.parent if folder.name == "checkpoints" else folder


def write_results(run: Path, step: int, text: str) -> Path:
    """Write the results of a step; those of other tasks at this step stay.

    Args:
        run: Folder of the run.
        step: The step of the checkpoint.
        text: JSON of the harness.

    Returns:
        The file.
    """
    path = run / FOLDER_NAME / f"{step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = json.loads(text)
    if path.is_file():
        new = _merge(json.loads(path.read_text(encoding="utf-8")), new)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(new, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Fields by task (``results``, ``configs``, ``n-samples``, ...) of both; else the new one."""
    merged = {**old, **new}
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict) and name != "config":
            merged[name] = {**old[name], **value}
    return merged


def add_to_run(run: Path, source: Any, results: dict[str, Any]) -> None:
    """Add the results of a checkpoint to its run, and say where they are.

    Args:
        run: Folder of the run.
        source: Reader of the checkpoint.
        results: Of the harness.
    """
    from trinity_megatron.evaluation.harness import to_json
    from trinity_megatron.report.report import report_run
    from trinity_megatron.telemetry.tensorboard_log import EVENT_FILES
    from trinity_megatron.telemetry.wandb_summary import add_to_summary

    step = int(source.common.get("iteration", 0))
    results["config"]["model_args"] = {"load": str(source.folder), "step": step}
    print(write_results(run, step, to_json(results)), flush=True)
    if any((run / "tensorboard").glob(EVENT_FILES)):
        print(report_run(run).page, flush=True)
    if _is_being_trained(run):
        print("W&B has not got the scores: the run is being trained (train --evaluate-every does)")
    elif said := add_to_summary(source.args, source.folder.parent, scalars_of(results)):
        print(said, flush=True)


def _is_being_trained(run: Path) -> bool:
    """Whether a training holds the lock of its folder."""
    if not (run / _LOCK_NAME).exists():
        return False
    lock = FileLock(run / _LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a filesystem without locks, or a folder of others
        return False
    lock.release()
    return False
