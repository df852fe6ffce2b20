"""The error of a write reaches the training with its text."""

import os
import queue
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trinity_megatron.checkpoint.save_worker import write_or_report
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

import torch  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import (  # noqa: E402
    FileSystemWriterAsync,
)
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms  # noqa: E402
from torch.distributed.checkpoint.metadata import MetadataIndex  # noqa: E402
from torch.distributed.checkpoint.planner import (  # noqa: E402
    WriteItem,
    WriteItemType,
)


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
