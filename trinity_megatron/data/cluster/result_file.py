"""Results of tasks: pickles of our own classes, beside ``--out`` where others may write too."""

import pickle
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError

_OURS = "trinity_megatron.data"
_NAMES = frozenset(
    {
        (f"{_OURS}.sources", "SourceFile"),
        (f"{_OURS}.sources", "Skipped"),
        (f"{_OURS}.formats", "Format"),
        (f"{_OURS}.formats", "ReadOptions"),
        (f"{_OURS}.manifest", "SplitSummary"),
        (f"{_OURS}.cluster.tasks", "Scanned"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
    }
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise ValueError(f"it names {module}.{name}")
        return super().find_class(module, name)


def load_result(path: Path) -> Any:
    """What a task has left; nothing but its classes is called.

    Args:
        path: Of ``pickle.dumps``.

    Raises:
        UserError: It is damaged, or names something else.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(
            f"{path} is no result of a task ({error}). Remedy: remove the folder {path.parent}, "
            "and run again."
        ) from error
