"""The index of the data is numbers; a file of objects is refused."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets import blended_dataset, gpt_dataset

from trinity_megatron.training.datasets.index_cache import plain_index_cache


class Call:
    """Pickled as a call of `os.mkdir`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("module", [gpt_dataset, blended_dataset])
@pytest.mark.parametrize("mmap_mode", [None, "r"])
@pytest.mark.parametrize("kind", ["objects", "pickle", "cut off", "empty"])
def test_only_numbers_are_loaded(
    tmp_path: Path, module: Any, mmap_mode: str | None, kind: str
) -> None:
    path, made = tmp_path / "index.npy", tmp_path / "made"
    numpy.save(path, numpy.arange(1000))
    with plain_index_cache():
        found = module.safe_numpy_load(str(path), allow_pickle=True, mmap_mode=mmap_mode)
        assert found[-1] == 999
    if kind == "objects":
        numpy.save(path, numpy.array([Call(made)], dtype=object), allow_pickle=True)
    else:
        whole = pickle.dumps(Call(made)) if kind == "pickle" else path.read_bytes()
        path.write_bytes({"cut off": whole[:-9], "empty": b""}.get(kind, whole))
    with plain_index_cache(), pytest.raises(ValueError, match="index.npy, an index of the data"):
        module.safe_numpy_load(str(path), allow_pickle=True, mmap_mode=mmap_mode)
    assert not made.exists()
