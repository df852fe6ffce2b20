"""Files of a folder from elsewhere that are copied into checkpoints and exports."""

import shutil
from pathlib import Path

from trinity_megatron.errors import UserError

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def copy_file(path: Path, target: Path) -> None:
    """Copy a file, and not what a link of somebody else leads to.

    Args:
        path: A file, or a link to one in its folder or in the cache of the Hugging Face Hub that
            the folder belongs to.
        target: The copy.

    Raises:
        UserError: It is a link that leads elsewhere, e.g. to a key of the user, who would publish
            the copy with an export.
    """
    if path.is_symlink() and not is_inside(path):
        raise UserError(
            f"{path} is a symbolic link that leads out of its folder, to {path.resolve()}; its "
            "content would go into a copy of the folder. Remedy: put the file itself there "
            "(cp -L), or remove the link."
        )
    shutil.copyfile(path, target)


def is_inside(path: Path) -> bool:
    """Whether a path ends in its own folder, or in the cache of the Hub that this belongs to."""
    folder = path.absolute().parent.resolve()
    allowed = [folder]
    if folder.parent.name == _SNAPSHOTS:
        allowed.append(folder.parent.parent / _BLOBS)
    return any(path.resolve().is_relative_to(each) for each in allowed)
