"""Results of tasks come back as they were, and call nothing else."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trinity_megatron.data.cluster.result_file import load_result
from trinity_megatron.data.cluster.tasks import Scanned
from trinity_megatron.data.corpus import Skipped, find_files
from trinity_megatron.data.formats import ReadOptions
from trinity_megatron.data.manifest import SplitSummary
from trinity_megatron.errors import UserError


class Call:
    """Pickled as a call of ``os.mkdir``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [None, 5])
def test_results_come_back(tmp_path: Path, protocol: int | None) -> None:
    (tmp_path / "a.txt").write_text("text")
    files, _ = find_files([tmp_path / "a.txt"])
    scanned = Scanned(
        ["11"],
        [Skipped("b", "empty")],
        [1],
        np.arange(3, dtype=np.uint64),
        np.arange(3),
        {"a.txt"},
    )
    path = tmp_path / "result.pickle"
    for value in (scanned, (files, ReadOptions(), [files]), [SplitSummary(1, 2, 3, 0.5)], "text"):
        path.write_bytes(pickle.dumps(value, protocol))
        found = load_result(path)
        assert str(found) == str(value) and type(found) is type(value)


def test_hostile_result(tmp_path: Path) -> None:
    path, made = tmp_path / "plan.pickle", tmp_path / "made"
    hostile = [pickle.dumps(Call(made)), pickle.dumps([Scanned(problem=Call(made))])]  # type: ignore[arg-type]
    for content in (*hostile, b"", b"\x80", b"\x80\x04cposix\nsystem\n."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"plan\.pickle is no result of a task"):
            load_result(path)
    assert not made.exists()
