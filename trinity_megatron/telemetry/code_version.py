"""The versions and the commit that a run was made with."""

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import torch

import trinity_megatron

_GIT_SECONDS = 10.0


def describe_code() -> dict[str, Any]:
    """Versions, and the git commit of the working directory or else of this package, if any."""
    versions = {"trinity_megatron": trinity_megatron.__version__, "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["megatron-core"] = importlib.metadata.version("megatron-core")
    folders = (Path.cwd(), Path(trinity_megatron.__file__).parent)
    commits = (read_git_commit(folder) for folder in folders)
    return {"versions": versions, "git_commit": next((c for c in commits if c), None)}


def read_git_commit(folder: Path) -> str | None:
    """The commit that is checked out around a folder; None without git or a checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
