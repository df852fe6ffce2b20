"""Settings of the integrity checks, and the check for symbolic links."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint

logger = logging.getLogger(__name__)


@dataclass
class Checks:
    """Settings and findings of the integrity checks of one load.

    Attributes:
        verify_checksums: Whether checksums are verified.
        quiet: Do not log files without checksums.
        refused: The error for which a ``.metadata`` was not loaded.  torch drops this error.
    """

    verify_checksums: bool = True
    quiet: bool = False
    refused: BadCheckpoint | None = None
    _logged_folders: set[str] = field(default_factory=set)

    def note_missing(self, path: str | Path) -> None:
        """Log that a file has no checksum, once per folder."""
        folder = os.path.dirname(path)
        if not self.quiet and folder not in self._logged_folders:
            self._logged_folders.add(folder)
            logger.warning(
                "%s has no checksum (an earlier release wrote it): damage in it is not noticed.",
                path,
            )


def check_stays_inside(folder: Path, name: str) -> None:
    """Refuse a symbolic link to a file outside the checkpoint.

    Args:
        folder: Folder of the checkpoint.
        name: Name of a file in it.

    Raises:
        BadCheckpoint: Names the link.
    """
    path = folder / name
    if path.is_symlink() and folder.resolve() not in path.resolve().parents:
        raise BadCheckpoint(
            f"{path} is a symbolic link that leads out of the checkpoint, to {path.resolve()}. "
            "Remedy: put the file itself there."
        )
