"""``torch_dist`` checkpoints read without a model: round trip and damage."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.unit_tests.checkpoint.torch_dist.torch_dist_cases import (
    COMMON,
    join,
    make_parts,
    make_tensors,
    slice_of,
    write,
)
from trinity_megatron.checkpoint.integrity.read_ahead import ReadAhead
from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.torch_dist.streams import StreamingFileSystem


def test_round_trip(checkpoint: Path) -> None:
    tensors, reader = make_tensors(), TorchDistReader(checkpoint)
    model = {key: tensor for key, tensor in tensors.items() if key != "optimizer.state"}
    expected = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in model.items()}
    assert reader.model_tensors() == expected
    assert all(torch.equal(join(reader, key), tensor) for key, tensor in model.items())
    assert reader.args == COMMON["args"] and reader.common["iteration"] == 12


def data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.distcp"))


@pytest.mark.parametrize("number", range(4))
def test_missing_file(checkpoint: Path, number: int) -> None:
    path = data_files(checkpoint)[number]
    path.unlink()
    with pytest.raises(ValueError) as error:
        TorchDistReader(checkpoint)
    assert f"{path} is missing" in str(error.value)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("lost", [1, 100])
def test_truncated_file(checkpoint: Path, number: int, lost: int) -> None:
    path = data_files(checkpoint)[number]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ValueError) as error:
        TorchDistReader(checkpoint)
    assert f"{path} is truncated: {size - lost} of {size} bytes" in str(error.value)


def damage(folder: Path, key: str, start: tuple[int, ...] | None, filling: bytes) -> None:
    """Write over one stored item."""
    storage = dcp.FileSystemReader(folder).read_metadata().storage_data
    (info,) = (
        info
        for index, info in storage.items()
        if index.fqn == key and (start is None or index.offset == torch.Size(start))
    )
    with (folder / info.relative_path).open("r+b") as file:
        file.seek(info.offset)
        file.write(filling * (info.length // len(filling)))


FILLINGS = pytest.mark.parametrize("filling", [b"\0", b"\xff", b"P", b"\x80\x02"])


@FILLINGS
def test_damaged_shard(checkpoint: Path, filling: bytes) -> None:
    good, bad = TorchDistReader(checkpoint).parts("bf16")[1:3]
    damage(checkpoint, "bf16", bad[0].start, filling)
    reader = TorchDistReader(checkpoint)
    with pytest.raises(ValueError) as error:
        reader.read(bad)
    assert f"{checkpoint}: the shard of bf16 at {bad[0].start} is damaged" in str(error.value)
    assert torch.equal(reader.read(good), slice_of(good[0], make_tensors()))


@FILLINGS
def test_damaged_common_state(checkpoint: Path, filling: bytes) -> None:
    damage(checkpoint, "common_state/shard_0_1", None, filling)
    with pytest.raises(ValueError) as error:
        TorchDistReader(checkpoint)
    assert str(checkpoint) in str(error.value) and "damaged" in str(error.value)


def test_megatrons_own_file_is_missing(checkpoint: Path) -> None:
    (checkpoint / "metadata.json").unlink()
    with pytest.raises(ValueError) as error:
        TorchDistReader(checkpoint)
    assert str(checkpoint) in str(error.value)


@pytest.mark.parametrize("kept", [0, 1, 40, 500])
def test_damaged_metadata(checkpoint: Path, kept: int) -> None:
    path = checkpoint / ".metadata"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="/.metadata is damaged"):
        TorchDistReader(checkpoint)


@pytest.mark.parametrize("key", ["matrix", "experts", "bf16"])
def test_incomplete_set_of_shards(tmp_path: Path, key: str) -> None:
    tensors = make_tensors()
    parts = make_parts(tensors)
    for lost in [part for part in parts if part.key == key]:
        folder = tmp_path / str(lost.start)
        write(folder, tensors, [[part for part in parts if part != lost]])
        reader = TorchDistReader(folder)
        with pytest.raises(ValueError, match=rf"the shards of {key} hold \d+ of \d+ numbers"):
            reader.parts(key)


def test_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": torch.ones(2, 2)}
    monkeypatch.setitem(COMMON, "args", None)
    write(tmp_path, tensors, [[Part("w", (0, 0), (2, 2))]])
    reader = TorchDistReader(tmp_path)
    with pytest.raises(ValueError, match="holds no arguments, so the model is not known"):
        _ = reader.args


def test_two_threads_read_at_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As an export does.  Reads used to share one read-ahead: a thread got the buffer of another.
    reader, tensors = TorchDistReader(checkpoint), make_tensors()
    both_opened, takers = threading.Barrier(2, timeout=60), []
    create_stream, take = StreamingFileSystem.create_stream, ReadAhead.take

    @contextmanager
    def wait_for_the_other(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with create_stream(self, path, mode) as stream:
            both_opened.wait()
            yield stream

    def note(self: ReadAhead, info: Any) -> Any:
        takers.append(self)
        return take(self, info)

    monkeypatch.setattr(StreamingFileSystem, "create_stream", wait_for_the_other)
    monkeypatch.setattr(ReadAhead, "take", note)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda key: reader.read(reader.parts(key)[0]), ["fp16", "bf16"])
        fp16, bf16 = found
    assert torch.equal(fp16, tensors["fp16"]) and torch.equal(bf16, tensors["bf16"][: len(bf16)])
    assert len(takers) == 2 and takers[0] is not takers[1]
