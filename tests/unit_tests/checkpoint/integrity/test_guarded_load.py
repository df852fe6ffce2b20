"""Megatron's own saving and loading, with checksums and without programs."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo

from trinity_megatron.checkpoint.integrity.checksums import get_checksum
from trinity_megatron.checkpoint.integrity.guarded_load import guarded_loads
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader, find_whole
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

COMMON = {"iteration": 3, "words": "of the run"}


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    enter_host()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def state(scale: float = 1.0) -> dict[str, Any]:
    values = scale * torch.arange(60_000, dtype=torch.float32).reshape(300, 200)
    return {
        "w": ShardedTensor.from_rank_offsets("w", values),
        "small": ShardedTensor.from_rank_offsets("small", values[0, :7].clone()),
        "random": ShardedObject("random", [1, 2, "three"], (1,), (0,)),
    }


def save(folder: Path, scale: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    with guarded_loads():
        common = {**COMMON, "iteration": int(folder.name.removeprefix("iter_"))}
        dist_checkpointing.save({**state(scale), **common}, str(folder))
    return folder


@pytest.fixture
def checkpoint(world: None, tmp_path: Path) -> Path:
    return save(tmp_path / "iter_0000003")


def load(folder: Path, **options: Any) -> dict[str, Any]:
    wanted = state(0.0)
    with guarded_loads(**options):
        return dist_checkpointing.load(wanted, str(folder))


def places(folder: Path) -> dict[str, _StorageInfo]:
    storage = FileSystemReader(folder).read_metadata().storage_data
    return {index.fqn: info for index, info in storage.items()}


def flip(path: Path, at: int, bits: int = 0x10) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def test_all_is_saved_with_checksums_and_loaded(checkpoint: Path) -> None:
    assert all(get_checksum(info) is not None for info in places(checkpoint).values())
    loaded = load(checkpoint)
    assert torch.equal(loaded["w"], state()["w"].data) and loaded["random"] == [1, 2, "three"]
    assert {name: loaded[name] for name in COMMON} == COMMON
    TorchDistReader(checkpoint).check_all()


def test_a_save_in_another_process_has_checksums(world: None, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    with guarded_loads():
        request = dist_checkpointing.save(
            {**state(), **COMMON}, str(folder), async_sharded_save=True, async_strategy="mcore"
        )
        assert request is not None
        calls = AsyncCallsQueue(persistent=False)
        calls.schedule_async_request(request)
        calls.maybe_finalize_async_calls(blocking=True)
    assert all(get_checksum(info) is not None for info in places(folder).values())
    TorchDistReader(folder).check_all()


def test_plain_torch_and_megatron_still_read_it(checkpoint: Path) -> None:
    loaded = dist_checkpointing.load(state(0.0), str(checkpoint))
    assert torch.equal(loaded["w"], state()["w"].data)


PLACES: dict[str, Callable[[_StorageInfo], int]] = {
    "zip header": lambda info: info.offset,
    "name of a record": lambda info: info.offset + 31,
    "padding": lambda info: info.offset + 60,
    "the numbers": lambda info: info.offset + info.length // 2,
    "directory": lambda info: info.offset + info.length - 250,
    "last byte": lambda info: info.offset + info.length - 1,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", ["w", "small", "random/shard_0_1", "common_state/shard_0_1"])
def test_damage_anywhere_is_named(checkpoint: Path, key: str, place: str) -> None:
    info = places(checkpoint)[key]
    path = checkpoint / info.relative_path
    flip(path, PLACES[place](info))
    with pytest.raises(BadCheckpoint, match=r"\.distcp is damaged") as error:
        load(checkpoint)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=r"\.distcp is damaged"):
        TorchDistReader(checkpoint).check_all()


@pytest.mark.parametrize("at", [0, 100, -300, -17, -9, -1])
def test_damaged_metadata_is_named(checkpoint: Path, at: int) -> None:
    flip(checkpoint / ".metadata", at)
    for read in (load, TorchDistReader):
        with pytest.raises(BadCheckpoint, match=r"\.metadata is damaged"):
            read(checkpoint)


def test_a_file_of_another_step_is_named(checkpoint: Path) -> None:
    other = save(checkpoint.parent / "iter_0000004", scale=2.0)
    (path,) = checkpoint.glob("*.distcp")
    shutil.copyfile(other / path.name, path)
    with pytest.raises(BadCheckpoint, match="is damaged, or belongs to another step"):
        load(checkpoint)


def test_the_whole_one_beside_it_is_found(checkpoint: Path) -> None:
    root = checkpoint.parent
    for step in (1, 2, 4):
        save(root / f"iter_{step:07d}")
    for step in (2, 4):
        (path,) = (root / f"iter_{step:07d}").glob("*.distcp")
        flip(path, path.stat().st_size // 2)
    assert find_whole(root, other_than=root / "iter_0000004") == 3
    assert find_whole(root, other_than=checkpoint) == 1

    def advise(folder: Path) -> str:
        return f" Step {find_whole(folder.parent, other_than=folder)}."

    with pytest.raises(BadCheckpoint, match=r"Remedy: copy the file again\. Step 3\.$"):
        load(root / "iter_0000004", advise=advise)


def test_damage_can_be_passed_over(checkpoint: Path) -> None:
    info = places(checkpoint)["w"]
    flip(checkpoint / info.relative_path, PLACES["the numbers"](info))
    loaded = load(checkpoint, verify_checksums=False)
    assert int((loaded["w"] != state()["w"].data).sum()) == 1


@pytest.mark.parametrize("has_records", [True, False])
def test_older_checkpoints(
    world: None, tmp_path: Path, has_records: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    torch.serialization.set_crc32_options(has_records)
    try:
        dist_checkpointing.save({**state(), **COMMON}, str(folder))
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load(folder)["w"], state()["w"].data)
    assert len([each for each in caplog.messages if "has no checksum" in each]) == 1
    info = places(folder)["w"]
    flip(folder / info.relative_path, PLACES["the numbers"](info))
    if has_records:
        with pytest.raises(BadCheckpoint, match=r"\.distcp is damaged"):
            load(folder)
    else:
        load(folder)


class Call:
    """Pickled as a call of `os.mkdir`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_an_object_of_the_optimizer_runs_nothing(checkpoint: Path, tmp_path: Path) -> None:
    folder, made = tmp_path / "iter_0000009", tmp_path / "made"
    folder.mkdir()
    evil = {**state(), "random": ShardedObject("random", Call(made), (1,), (0,))}
    dist_checkpointing.save({**evil, **COMMON}, str(folder))
    with pytest.raises(BadCheckpoint, match=r"distcp: an object in it names posix\.mkdir"):
        load(folder)
    assert not made.exists()


def test_metadata_runs_nothing(checkpoint: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(checkpoint).read_metadata()
    metadata.planner_data = Call(tmp_path / "made")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (load, TorchDistReader):
        with pytest.raises(BadCheckpoint, match=r"names posix\.mkdir"):
            read(checkpoint)
    assert not (tmp_path / "made").exists()


def test_a_link_that_leads_out(checkpoint: Path, tmp_path: Path) -> None:
    (path,) = checkpoint.glob("*.distcp")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for read in (load, TorchDistReader):
        with pytest.raises(BadCheckpoint, match="is a symbolic link that leads out"):
            read(checkpoint)


@pytest.mark.parametrize("content", ["{", "[]", '{"sharded_backend": "zarr"}', '{"sharded_x": 1}'])
def test_damaged_format_file(checkpoint: Path, content: str) -> None:
    (checkpoint / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.json is damaged"):
        TorchDistReader(checkpoint)
