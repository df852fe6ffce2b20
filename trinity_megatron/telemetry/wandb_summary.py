"""Numbers that are known after a training, added to the summary of its W&B run."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from trinity_megatron.telemetry import wandb_run


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
    file = checkpoints / wandb_run.ID_FILE
    project = getattr(args, "wandb_project", None)
    if not project or not file.is_file() or os.environ.get("WANDB_MODE") == "disabled":
        return None
    os.environ.update({**wandb_run.ENVIRONMENT, **os.environ})
    moved = argparse.Namespace(**{**vars(args), "save": str(checkpoints)})
    try:
        run, _ = wandb_run.open_run(moved, file.read_text().strip(), lambda: True)
        run.summary.update(dict(values))
        run.finish()
    except (Exception, SystemExit) as error:
        return f"W&B has not got the scores: {wandb_run.first_line(error)}."
    finally:
        wandb_run.teardown()
    if run.offline:
        return f"W&B is offline: {wandb_run.sync_command(run)} sends the scores"
    return f"W&B {run.url}"
