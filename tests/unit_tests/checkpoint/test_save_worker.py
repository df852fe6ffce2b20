"""What an asynchronous save writes; the error of a write reaches the training with its text."""

import os
import queue
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trinity_megatron.checkpoint.save_worker import (
    copies_for_async_saves,
    results_in_this_process,
    write_or_report,
)
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

import torch  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import (  # noqa: E402
    FileSystemWriterAsync,
)
from torch.distributed.checkpoint.filesystem import (  # noqa: E402
    _StoragePrefix,
    _StorageWriterTransforms,
)
from torch.distributed.checkpoint.metadata import MetadataIndex  # noqa: E402
from torch.distributed.checkpoint.planner import (  # noqa: E402
    SavePlan,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import _create_write_items  # noqa: E402


def make_bucket(path: Path) -> tuple[Any, ...]:
    """A tensor that Megatron's writer is to put into a file."""
    item = WriteItem(MetadataIndex("weight"), WriteItemType.SHARD, tensor_data=None)
    return (str(path), path.name, ([], [(item, torch.zeros(1000))]))


def write(buckets: list[Any]) -> Any:
    """What Megatron's writer puts into the queue."""
    results: queue.Queue = queue.Queue()
    megatron: Callable[..., None] = FileSystemWriterAsync.write_preloaded_data_multithread
    write_or_report(partial(megatron, [_StorageWriterTransforms()], False), 0, buckets, results)
    assert results.qsize() == 1
    return results.get()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_is_written(number: int, tmp_path: Path) -> None:
    results = write([make_bucket(tmp_path / str(index)) for index in range(number)])
    assert sorted(results) == list(range(number))
    assert all(len(results[index]) == 1 for index in results)
    assert all((tmp_path / str(index)).stat().st_size > 4000 for index in range(number))


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize(
    ("place", "text"),
    [("missing/file", "No such file"), (".", "Is a directory"), ("/dev/full", "No space left")],
)
def test_which_thread_fails_does_not_matter(
    failing: int, place: str, text: str, tmp_path: Path
) -> None:
    buckets = [make_bucket(tmp_path / str(index)) for index in range(3)]
    buckets[failing] = make_bucket(tmp_path / place)
    before = vars(FileSystemWriterAsync)["write_preloaded_data"]
    error = write(buckets)
    assert isinstance(error, RuntimeError) and "[Errno " in str(error) and text in str(error)
    assert vars(FileSystemWriterAsync)["write_preloaded_data"] is before
    assert os.path.exists("/dev/full")


@pytest.mark.parametrize("is_async", [True, False])
def test_an_asynchronous_save_writes_what_was_there(is_async: bool, tmp_path: Path) -> None:
    """Whole tensors of the host, which Megatron shares with its process, and parts of a storage."""
    buffer = torch.zeros(8)
    state = {"whole": torch.zeros(4, requires_grad=True), "part": buffer[:4]}
    items = [item for name, value in state.items() for item in _create_write_items(name, value)]
    plan = SavePlan(items, storage_data=_StoragePrefix("__0_"))
    planner = SimpleNamespace(resolve_data=lambda item: state[item.index.fqn])
    writer = FileSystemWriterAsync(tmp_path, thread_count=1)
    with copies_for_async_saves(lambda: is_async), results_in_this_process():
        writer.prepare_write_data(plan, planner)
    for tensor in (*state.values(), buffer):
        tensor.data.add_(1)  # the next step
    [(_, _, (_, prepared))] = writer.write_buckets
    found = {item.index.fqn: tensor.unique().tolist() for item, tensor in prepared}
    assert found == {"whole": [0.0] if is_async else [1.0], "part": [0.0]}
