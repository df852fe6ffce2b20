"""Checksums by arithmetic are those of the bytes."""

import io
import os
import random
import zlib
from pathlib import Path

import pytest
import torch

from trinity_megatron.checkpoint.integrity.checksums import (
    FilePart,
    Window,
    check_records,
    combine,
    derive_checksum,
    seal,
    unseal,
)
from trinity_megatron.checkpoint.integrity.direct_read import read_checksum


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (1, 1), (7, 100_003), (2**16, 2**20)])
def test_checksum_of_two_pieces(sizes: tuple[int, int]) -> None:
    first, second = map(random.Random(0).randbytes, sizes)
    whole = combine(zlib.crc32(first), zlib.crc32(second), len(second))
    assert whole == zlib.crc32(first + second)


def save(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


ITEMS = (
    torch.zeros(0),
    torch.arange(5),
    torch.randn(100_000),
    torch.randn(20_001).bfloat16(),
    [torch.randn(50_000), {"a": torch.zeros(3)}, "words" * 50_000],
)


@pytest.mark.parametrize("value", ITEMS, ids=range(len(ITEMS)))
def test_checksum_of_an_item_follows_from_those_inside(tmp_path: Path, value: object) -> None:
    content = save(value)
    assert derive_checksum(io.BytesIO(content), len(content)) == zlib.crc32(content)
    path = tmp_path / "between others"
    path.write_bytes(b"before" + content + b"behind")
    with path.open("rb") as file:
        part = FilePart(file.fileno(), 6, len(content))
        assert derive_checksum(part, len(content)) == zlib.crc32(content)


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1000, 1001, 5000])
def test_checksum_piece_by_piece(tmp_path: Path, num_bytes: int) -> None:
    content = random.Random(1).randbytes(num_bytes)
    path, buffer = tmp_path / "file", bytearray(1000)
    path.write_bytes(b"before" + content + b"behind")
    with path.open("rb") as file:
        assert read_checksum(buffer, file.fileno(), 6, num_bytes) == zlib.crc32(content)
        with pytest.raises(EOFError):
            read_checksum(buffer, file.fileno(), 6, num_bytes + 7)


def test_items_without_checksums() -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        content = save(torch.randn(100_000))
    finally:
        torch.serialization.set_crc32_options(before)
    assert derive_checksum(io.BytesIO(content), len(content)) is None
    assert not check_records(io.BytesIO(content))


def test_every_changed_byte_of_the_numbers_is_found() -> None:
    tensor = torch.full((300,), 1.5)
    content = bytearray(save(tensor))
    start = content.index(tensor.numpy().tobytes())
    assert check_records(Window(memoryview(content)))
    for at in (start, start + 1, start + 600, start + 1199):
        content[at] ^= 1
        with pytest.raises(ValueError, match="does not have the CRC-32"):
            check_records(Window(memoryview(content)))
        content[at] ^= 1


def test_seal() -> None:
    content = os.urandom(1000)
    assert unseal(seal(content)) == (content, True)
    assert unseal(content) == (content, False)
    for at in (0, 500, 999):
        damaged = bytearray(seal(content))
        damaged[at] ^= 4
        with pytest.raises(ValueError, match="CRC-32"):
            unseal(bytes(damaged))
