"""Reading a stored tensor straight into the tensor that is loaded."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.integrity.checksums import FilePart, set_checksum
from trinity_megatron.checkpoint.integrity.direct_read import (
    find_target,
    find_values,
    read_into,
    read_pieces,
)
from trinity_megatron.checkpoint.integrity.read_ahead import ReadAhead, Request
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint

BEFORE = b"another item"


def write_item(path: Path, value: Tensor) -> tuple[_StorageInfo, bytes]:
    stream = io.BytesIO()
    torch.save(value, stream)
    content = stream.getvalue()
    path.write_bytes(BEFORE + content)
    return _StorageInfo(path.name, len(BEFORE), len(content)), content


@pytest.fixture
def values() -> Tensor:
    return torch.arange(300_000, dtype=torch.float32).reshape(300, 1000)


@pytest.fixture
def item(tmp_path: Path, values: Tensor) -> Iterator[tuple[int, _StorageInfo, bytes]]:
    info, content = write_item(tmp_path / "file", values)
    file = os.open(tmp_path / "file", os.O_RDONLY)
    yield file, info, content
    os.close(file)


def planner_of(tensor: object) -> DefaultLoadPlanner:
    planner = DefaultLoadPlanner()
    planner.state_dict = {"w": tensor}
    return planner


def request_of(*, start: int = 0, to: int = 0, rows: int = 3, columns: int = 4) -> ReadItem:
    index, zero = MetadataIndex("w"), torch.Size((start, 0))
    size = torch.Size((rows, columns))
    return ReadItem(LoadItemType.TENSOR, index, torch.Size((to, 0)), index, zero, size)


def test_the_target_is_a_view_of_what_is_loaded() -> None:
    tensor = torch.nn.Parameter(torch.zeros(5, 4))
    target = find_target(planner_of(tensor), request_of(to=2))
    assert target is not None and target.shape == (3, 4) and not target.requires_grad
    assert target.data_ptr() == tensor[2:].data_ptr()


@pytest.mark.parametrize(
    ("tensor", "request_"),
    [
        (torch.zeros(5, 4), request_of(start=1)),  # not from its first element on
        (torch.zeros(5, 8), request_of()),  # rows of another matrix
        (torch.zeros(5, 4, device="meta"), request_of()),
    ],
)
def test_torch_loads_what_has_no_target(tensor: Tensor, request_: ReadItem) -> None:
    assert find_target(planner_of(tensor), request_) is None
    assert find_target(object(), request_) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(7, 33), ()])
def test_values_and_checksum(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    stored = torch.randn(shape).to(dtype)
    info, content = write_item(tmp_path / "file", stored)
    file = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        for verify, checksum in ((True, zlib.crc32(content)), (False, 0)):
            target = torch.zeros(shape).to(dtype)
            assert read_into(target, file, info, verify=verify) == checksum
            assert torch.equal(target.float(), stored.float())
    finally:
        os.close(file)


@pytest.mark.parametrize(
    "target", [torch.zeros(300, 1000, dtype=torch.bfloat16), torch.zeros(1000, 300)]
)
def test_a_tensor_of_another_kind_is_not_read(
    item: tuple[int, _StorageInfo, bytes], target: Tensor
) -> None:
    file, info, _ = item
    assert read_into(target, file, info, verify=True) is None
    assert not target.any()


def test_a_transposed_tensor_is_not_read(tmp_path: Path, values: Tensor) -> None:
    info, _ = write_item(tmp_path / "file", values.T)
    with (tmp_path / "file").open("rb") as file:
        part = FilePart(file.fileno(), info.offset, info.length)
        assert find_values(part, info.length, torch.zeros(1000, 300)) is None


def test_another_byte_order_is_not_read(values: Tensor) -> None:
    before, after = io.BytesIO(), io.BytesIO()
    torch.save(values, before)
    with zipfile.ZipFile(before) as old, zipfile.ZipFile(after, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, b"big" if name.endswith("/byteorder") else content)
    size = len(after.getvalue())
    after.seek(0)
    assert find_values(after, size, torch.zeros_like(values)) is None


def test_a_file_that_is_too_short(item: tuple[int, _StorageInfo, bytes]) -> None:
    file, info, content = item
    with pytest.raises(EOFError):
        read_pieces(memoryview(bytearray(info.length + 1)), file, info.offset, None)
    place = memoryview(bytearray(info.length))
    assert read_pieces(place, file, info.offset, 0) == zlib.crc32(content)
    assert place == content


def test_read_ahead_fills_the_target(
    tmp_path: Path, item: tuple[int, _StorageInfo, bytes], values: Tensor
) -> None:
    _, info, content = item
    set_checksum(info, zlib.crc32(content))
    targets = [torch.zeros_like(values) for _ in range(2)]
    requests = [Request(info, target) for target in targets]
    with ReadAhead(tmp_path, requests, Checks()) as ahead:
        for target in targets:
            assert ahead.take(info).tensor is target and torch.equal(target, values)
    set_checksum(info, zlib.crc32(content) ^ 1)
    with ReadAhead(tmp_path, requests, Checks()) as ahead, pytest.raises(BadCheckpoint):
        ahead.take(info)
    with ReadAhead(tmp_path, requests, Checks(verify_checksums=False)) as ahead:
        assert ahead.take(info).tensor is targets[0]
