"""Skips what this machine lacks, with the reason; a world of one rank on the GPU or the CPU."""

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.unit_tests.parallel_state import one_rank_world

Record = Callable[[str, float, float], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif item.get_closest_marker("te") and not importlib.util.find_spec("transformer_engine"):
            item.add_marker(pytest.mark.skip(reason="needs Transformer Engine, see docs/gpu.md"))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """Megatron's parallel state for one rank, and the device that it computes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with one_rank_world(tmp_path_factory.mktemp("store") / "store"):
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Put an error with its bound into the report of gpu-check, and hold it to the bound."""

    def check(name: str, error: float, bound: float) -> None:
        record_property(name, f"{error:.1e} ({bound:.1e})")
        assert error <= bound, f"{name}: {error:.2e}, bound {bound:.2e}"

    return check
