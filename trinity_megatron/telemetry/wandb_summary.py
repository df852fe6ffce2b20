"""Numbers that are known after a training, added to the summary of its W&B run."""

import argparse
import contextlib
import copy
import os
from collections.abc import Mapping
from pathlib import Path

from trinity_megatron.telemetry.wandb_run import (
    ENVIRONMENT,
    ID_FILE,
    WandbUnavailableError,
    check_folder,
    find_files,
    find_folder,
    first_line,
    start_run,
    teardown,
    why_offline,
)


def add_to_summary(
    args: argparse.Namespace, checkpoints: Path, values: Mapping[str, float]
) -> str | None:
    """Add to the summary of the run that has saved a checkpoint.

    Args:
        args: Megatron's, of the run.
        checkpoints: What ``--save`` was, where it is now.
        values: By name.

    Returns:
        What came of it; None if the run is none of W&B, or with WANDB_MODE=disabled.
    """
    file = checkpoints / ID_FILE
    project = getattr(args, "wandb_project", None)
    if not project or not file.is_file() or os.environ.get("WANDB_MODE") == "disabled":
        return None
    moved = copy.copy(args)
    moved.save = str(checkpoints)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    run_id = file.read_text().strip()
    try:
        return _add(moved, run_id, values)
    except (Exception, SystemExit) as error:
        return f"W&B has not got the scores: {first_line(error)}."
    finally:
        with contextlib.suppress(BaseException):
            teardown()


def _add(args: argparse.Namespace, run_id: str, values: Mapping[str, float]) -> str:
    folder = find_folder(args)
    check_folder(folder)
    is_offline = why_offline(find_files(folder, run_id)) is not None
    run = start_run(args, folder, run_id, "offline" if is_offline else None)
    if run is None:
        raise WandbUnavailableError("it has not started the run")
    run.summary.update(dict(values))
    run.finish()
    if is_offline:
        return (
            f"W&B is offline: `wandb sync {folder}/wandb/offline-run-*-{run_id}` sends the scores"
        )
    return f"W&B {run.url}"
