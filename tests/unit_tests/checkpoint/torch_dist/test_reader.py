"""``torch_dist`` checkpoints read without a model: round trip and damage."""

from pathlib import Path

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
from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader


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


def test_two_threads_read_at_once(tmp_path: Path) -> None:
    # As an export does.  Reads used to share one read-ahead: a thread got the bytes of another.
    from concurrent.futures import ThreadPoolExecutor

    generator = torch.Generator().manual_seed(0)
    tensors = {f"weight{n}": torch.rand(64, 500 + n, generator=generator) for n in range(40)}
    write(
        tmp_path / "many",
        tensors,
        [[Part(key, (0, 0), (64, tensor.shape[1]))] for key, tensor in tensors.items()],
    )
    reader = TorchDistReader(tmp_path / "many")

    def read_all(keys: list[str]) -> bool:
        return all(torch.equal(join(reader, key), tensors[key]) for key in keys * 5)

    names = list(tensors)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(read_all, [names[::2], names[1::2]]))
