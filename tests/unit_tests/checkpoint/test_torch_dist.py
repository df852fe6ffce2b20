"""``torch_dist`` checkpoints without a model: written, read back, and damaged."""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import load_common_state_dict

from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.torch_dist.tracker import find_checkpoint
from trinity_megatron.checkpoint.torch_dist.writer import TorchDistWriter
from trinity_megatron.checkpoint.transforms import cut

COMMON = {"args": argparse.Namespace(num_layers=3, window_size=(7, 0)), "iteration": 12}
EXTRA_STATE = ["decoder.layers.0.a._extra_state", "decoder.layers.1.a._extra_state"]


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(12, 10, generator=generator),
        "bf16": torch.randn(7, 6, generator=generator).bfloat16(),
        "fp16": torch.randn(5, generator=generator).half(),
        "experts": torch.randn(4, 6, 8, generator=generator),
        "optimizer.state": torch.randn(3, generator=generator),
    }


def columns(key: str, shape: tuple[int, ...], at: Sequence[int], rows: int) -> list[Part]:
    """As tensor parallelism cuts the second matrix of an MLP, and pipelining the experts."""
    bounds = [0, *at, shape[-1]]
    parts = []
    for start, size in cut(shape, rows * shape[-1]):
        for low, high in zip(bounds, bounds[1:], strict=False):
            parts.append(Part(key, (*start[:-1], low), (*size[:-1], high - low)))
    return parts


def make_parts(tensors: dict[str, torch.Tensor]) -> list[Part]:
    """Some whole, some in runs of rows, some in columns of different widths."""
    parts = columns("matrix", (12, 10), at=[3, 4], rows=6)
    parts += columns("experts", (4, 6, 8), at=[4], rows=6)
    parts += [Part("bf16", *box) for box in cut((7, 6), 12)]
    return parts + [
        Part(key, (0,), tuple(tensors[key].shape)) for key in ("fp16", "optimizer.state")
    ]


def slice_of(part: Part, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    box = zip(part.start, part.shape, strict=True)
    return tensors[part.key][tuple(slice(a, a + n) for a, n in box)].contiguous()


def write(
    folder: Path, tensors: dict[str, torch.Tensor], files: Sequence[Sequence[Part]]
) -> list[Part]:
    """Write a checkpoint, the files in another order than they are named in."""
    folder.mkdir(parents=True, exist_ok=True)
    asked: list[Part] = []

    def read(part: Part) -> torch.Tensor:
        asked.append(part)
        return slice_of(part, tensors)

    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    writer = TorchDistWriter(folder, shapes, files, common=COMMON, extra_state=EXTRA_STATE)
    results = {index: writer.write(index, read) for index in reversed(range(len(files)))}
    writer.finish([results[index] for index in range(len(files))])
    return asked


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A good checkpoint of three files, and one for what is no tensor."""
    tensors = make_tensors()
    parts = make_parts(tensors)
    random.Random(0).shuffle(parts)
    folder = tmp_path / "iter_0000012"
    write(folder, tensors, [parts[0::3], parts[1::3], parts[2::3]])
    return folder


def join(reader: TorchDistReader, key: str) -> torch.Tensor:
    """A whole tensor; NaN where nothing was read."""
    dtype, shape = reader.model_tensors()[key]
    whole = torch.full(shape, torch.nan, dtype=dtype)
    for parts in reader.parts(key):
        rows = reader.read(parts)
        start = parts[0].start
        box = zip(start, rows.shape, strict=True)
        whole[tuple(slice(a, a + n) for a, n in box)] = rows
        assert start[-1] == 0 and rows.shape[-1] == shape[-1]
    return whole


def test_round_trip(checkpoint: Path) -> None:
    tensors, reader = make_tensors(), TorchDistReader(checkpoint)
    model = {key: tensor for key, tensor in tensors.items() if key != "optimizer.state"}
    expected = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in model.items()}
    assert reader.model_tensors() == expected
    assert all(torch.equal(join(reader, key), tensor) for key, tensor in model.items())
    assert reader.args == COMMON["args"] and reader.common["iteration"] == 12


def test_every_part_is_asked_for_once(tmp_path: Path) -> None:
    tensors = make_tensors()
    parts = make_parts(tensors)
    asked = write(tmp_path / "iter", tensors, [parts[::2], parts[1::2]])
    assert sorted(asked, key=str) == sorted(parts, key=str)


def test_memory_of_a_part_can_be_used_for_the_next(tmp_path: Path) -> None:
    values = torch.arange(40.0).reshape(10, 4)
    parts = [Part("w", *box) for box in cut((10, 4), 8)]
    memory = torch.empty(2, 4)

    def read(part: Part) -> torch.Tensor:
        return memory.copy_(slice_of(part, {"w": values}))

    shapes = {"w": (values.dtype, (10, 4))}
    writer = TorchDistWriter(tmp_path, shapes, [parts], common=COMMON, extra_state=[])
    writer.finish([writer.write(0, read)])
    assert torch.equal(join(TorchDistReader(tmp_path), "w"), values)


def test_torch_reads_what_is_written(checkpoint: Path) -> None:
    expected = make_tensors()
    found: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_megatron_reads_the_common_state(checkpoint: Path) -> None:
    assert load_common_state_dict(str(checkpoint)) == COMMON


def test_extra_state_is_there_for_megatron(checkpoint: Path) -> None:
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    objects = {f"{key}/shard_0_1" for key in EXTRA_STATE} | {"common_state/shard_0_1"}
    assert metadata.state_dict_metadata.keys() == {*make_tensors(), *objects}


def test_one_file_is_written_again_alone(checkpoint: Path, tmp_path: Path) -> None:
    tensors = make_tensors()
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    parts = make_parts(tensors)
    files = [parts[0::2], parts[1::2]]
    folder = tmp_path / "again"
    folder.mkdir()
    options: dict[str, Any] = {"common": COMMON, "extra_state": EXTRA_STATE}

    def nothing(part: Part) -> torch.Tensor:
        return torch.zeros(part.shape, dtype=tensors[part.key].dtype)

    first = TorchDistWriter(folder, shapes, files, **options)
    kept = first.write(0, lambda part: slice_of(part, tensors))
    first.write(1, nothing)  # and then the lights go out
    second = TorchDistWriter(folder, shapes, files, **options)
    second.finish([kept, second.write(1, lambda part: slice_of(part, tensors))])
    reader = TorchDistReader(folder)
    assert all(torch.equal(join(reader, key), tensors[key]) for key in reader.model_tensors())


@pytest.mark.parametrize(("word", "name"), [("12", "iter_0000012"), ("release\n", "release")])
def test_the_latest_is_found(checkpoint: Path, word: str, name: str) -> None:
    root = checkpoint.parent
    (root / "latest_checkpointed_iteration.txt").write_text(word)
    checkpoint.rename(root / name)
    assert find_checkpoint(root) == find_checkpoint(root / name) == root / name


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Megatron checkpoint: it has no latest_checkpointed"):
        find_checkpoint(tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("yesterday")
    with pytest.raises(ValueError, match="says 'yesterday', which is neither an iteration nor"):
        find_checkpoint(tmp_path)
    tracker.write_text("34")
    (tmp_path / "iter_0000034").mkdir()  # of another format, or cut off
    with pytest.raises(ValueError, match="iter_0000034 is no complete torch_dist checkpoint"):
        find_checkpoint(tmp_path)


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
