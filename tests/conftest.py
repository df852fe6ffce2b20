"""A small prepared data folder for all tests that train."""

import functools
import inspect
import sysconfig
from pathlib import Path

import pytest

from trinity_megatron.data.prepare import prepare_data

# Megatron's parser reads its flags from the sources of its config classes, 0.2 s each time.
inspect.getsource = functools.cache(inspect.getsource)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dozen files of the standard library, 512 tokens."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))[:36]
    prepare_data(out, sources, vocab_size=512)
    return out
