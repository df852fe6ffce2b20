"""Folders of a run's checkpoints: iteration names and the tracker file of the latest one."""

import os
from pathlib import Path

from trinity_megatron.errors import UserError

TRACKER_NAME = "latest_checkpointed_iteration.txt"
# Megatron's name for a checkpoint of weights alone, without optimizer and iteration.
RELEASE = "release"
_MAX_LETTERS, _MAX_DIGITS = 100, 18


def read_tracker(folder: Path) -> str | None:
    """Read the tracker file, which names the latest checkpoint.

    Args:
        folder: Value of ``--save``.

    Returns:
        An iteration, `RELEASE`, or other text if the file is damaged; None if there is no file.
    """
    tracker = folder / TRACKER_NAME
    if not tracker.is_file():
        return None
    with tracker.open(errors="replace") as file:
        word = file.read(_MAX_LETTERS).strip()
    # `isdigit` takes digits of all scripts, and folders have names of at most 255 letters.
    is_step = word.isascii() and len(word) <= _MAX_DIGITS
    return repr(word) if word.isdigit() and not is_step else word


def write_tracker(folder: Path, step: int) -> None:
    """Have the tracker file name an iteration; a kill leaves the old name or the new one.

    Args:
        folder: Value of ``--save``.
        step: The iteration.
    """
    tracker = folder / TRACKER_NAME
    draft = tracker.with_suffix(".tmp")
    draft.write_text(str(step))
    os.replace(draft, tracker)


def iteration_name(step: int) -> str:
    """Name of the folder of an iteration."""
    return f"iter_{step:07d}"


def find_checkpoint(folder: Path) -> Path:
    """Find the folder of the latest checkpoint.

    Args:
        folder: Value of ``--save``, or the folder of one iteration.

    Raises:
        UserError: There is no checkpoint, or it has another format.
    """
    if (folder / ".metadata").is_file():
        return folder
    tracker, word = folder / TRACKER_NAME, read_tracker(folder)
    if word is None:
        raise UserError(
            f"{folder} holds no Megatron checkpoint: it has no {TRACKER_NAME}. Remedy: give the "
            "folder of --save (for a run made with --out: OUT/checkpoints)."
        )
    name = word if word == RELEASE else iteration_name(int(word)) if word.isdigit() else None
    if name is None:
        raise UserError(
            f"{tracker} says {word!r}, which is neither an iteration nor {RELEASE!r}. Remedy: "
            "write the number of a complete iteration into it."
        )
    found = folder / name
    if not (found / ".metadata").is_file():
        raise UserError(
            f"{found} is no complete torch_dist checkpoint: it has no .metadata. Remedy: save with "
            "--ckpt-format torch_dist, or name a complete iteration in " + str(tracker) + "."
        )
    return found
