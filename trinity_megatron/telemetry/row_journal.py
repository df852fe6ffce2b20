"""The latest rows of a run in a file of our own, which survives a kill."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RowJournal:
    """One JSON object a line: a step and the numbers and texts of it.

    wandb's process dies with the training and takes along what it has not written.  Writing here is
    also the test whether the folder can still be written.

    Args:
        path: The file; it is made, its folder too.
        keep: Rows to keep at least; the file has at most twice as many lines and some.

    Attributes:
        rows: Values by step, in the order in which they were written last.
    """

    def __init__(self, path: Path, *, keep: int = 500) -> None:
        path.parent.mkdir(exist_ok=True)
        self.rows: dict[int, dict[str, Any]] = {}
        self._path, self._keep = path, keep
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut by a kill
                entry = json.loads(line)
                self._add(entry["step"], entry["values"])
        self._num_lines = 2 * keep  # the first row rewrites it, without a line that a kill cut

    def append(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Add rows, or values to rows.

        Raises:
            OSError: The file cannot be written.
        """
        parts = {
            step: {name: v for name, v in row.items() if isinstance(v, int | float | str)}
            for step, row in sorted(rows.items())
        }
        for step, values in parts.items():
            self._add(step, values)
        self._num_lines += len(parts)
        if self._num_lines > 2 * self._keep:
            self._rewrite()
        else:
            with self._path.open("a") as file:
                file.writelines(map(_line, parts.items()))

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        self.rows[step] = {**self.rows.pop(step, {}), **values}
        if len(self.rows) > self._keep:
            del self.rows[next(iter(self.rows))]

    def _rewrite(self) -> None:
        shorter = self._path.with_name(f".{self._path.name}")
        with shorter.open("w") as file:
            file.writelines(map(_line, self.rows.items()))
        shorter.replace(self._path)
        self._num_lines = len(self.rows)


def _line(row: tuple[int, Mapping[str, Any]]) -> str:
    return json.dumps({"step": row[0], "values": row[1]}) + "\n"
