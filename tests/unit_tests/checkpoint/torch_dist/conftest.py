"""A ``torch_dist`` checkpoint of three files."""

import random
from pathlib import Path

import pytest

from tests.unit_tests.checkpoint.torch_dist.torch_dist_cases import make_parts, make_tensors, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A good checkpoint of three files, and one for what is no tensor."""
    tensors = make_tensors()
    parts = make_parts(tensors)
    random.Random(0).shuffle(parts)
    folder = tmp_path / "iter_0000012"
    write(folder, tensors, [parts[0::3], parts[1::3], parts[2::3]])
    return folder
