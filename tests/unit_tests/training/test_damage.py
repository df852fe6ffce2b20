"""A damaged checkpoint is named, or left behind for the newest whole one."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trinity_megatron.checkpoint.torch_dist.parts import share_of
from trinity_megatron.checkpoint.torch_dist.tracker import read_tracker
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: E402

from trinity_megatron.checkpoint.integrity.guarded_load import guarded_loads  # noqa: E402
from trinity_megatron.errors import UserError  # noqa: E402
from trinity_megatron.training import damage  # noqa: E402
from trinity_megatron.training.damage import (  # noqa: E402
    check_on_damage,
    find_damage,
    leave_damage_behind,
    set_unreadable_aside,
)

STEPS = (10, 20, 30)


def save(folder: Path, step: int) -> Path:
    """A checkpoint of two tensors, whose files have the same sizes in every step."""
    from megatron.core import dist_checkpointing

    made = folder / f"iter_{step:07d}"
    made.mkdir(parents=True)
    sharded = {
        name: dist_checkpointing.ShardedTensor.from_rank_offsets(name, torch.arange(4096.0) + step)
        for name in ("x", "y")
    }
    with guarded_loads():
        dist_checkpointing.save({"iteration": step, **sharded}, str(made))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    return made


@pytest.fixture(scope="module")
def saved(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for step in STEPS:
        save(folder, step)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def swap(path: Path) -> None:
    """The file of that name of the step before."""
    shutil.copy(path.parents[1] / "iter_0000020" / path.name, path)


DAMAGES = (flip, truncate, swap, Path.unlink)
SHARDS = ("__0_0.distcp",)


def damaged_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("damaged_*"))


def test_whole_checkpoints_stay(folder: Path) -> None:
    set_unreadable_aside(folder)
    leave_damage_behind(folder)
    assert read_tracker(folder) == "30" and not damaged_names(folder)
    files = sorted(path.name for path in (folder / "iter_0000030").iterdir())
    assert files == [".metadata", *SHARDS, "metadata.json"]  # as each is damaged below


@pytest.mark.parametrize("name", [".metadata", "metadata.json", *SHARDS])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_each_kind_of_damage(damage: Callable[[Path], None], name: str, folder: Path) -> None:
    latest = folder / "iter_0000030"
    if damage is swap and name == "metadata.json":
        pytest.skip("it is the same file in every step")
    damage(latest / name)
    message = find_damage(latest, 0, 1)
    assert message is not None and "Remedy" in message
    assert name in message or (damage is swap and name == ".metadata")
    set_unreadable_aside(folder)
    leave_damage_behind(folder)
    assert read_tracker(folder) == "20" and damaged_names(folder) == ["damaged_iter_0000030"]
    assert find_damage(folder / "iter_0000020", 0, 1) is None


def test_a_folder_of_another_step(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000030")
    shutil.copytree(folder / "iter_0000020", folder / "iter_0000030")
    assert "iter_0000030 holds step 20" in (find_damage(folder / "iter_0000030") or "")
    set_unreadable_aside(folder)
    assert read_tracker(folder) == "20"


def test_a_folder_that_is_gone(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000030")
    set_unreadable_aside(folder)
    assert read_tracker(folder) == "20" and not damaged_names(folder)


def test_several_damaged_ones(folder: Path) -> None:
    flip(folder / "iter_0000020" / "__0_0.distcp")
    flip(folder / "iter_0000030" / "__0_0.distcp")
    (folder / "damaged_iter_0000030").mkdir()  # of an earlier time
    leave_damage_behind(folder)
    assert read_tracker(folder) == "10"
    assert damaged_names(folder) == [
        "damaged_iter_0000020",
        "damaged_iter_0000030",
        "damaged_iter_0000030_2",
    ]


@pytest.mark.parametrize("act", [set_unreadable_aside, leave_damage_behind])
def test_none_is_left(act: Callable[[Path], None], folder: Path) -> None:
    for step in STEPS:
        (folder / f"iter_{step:07d}" / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="No whole checkpoint of an earlier step"):
        act(folder)
    assert read_tracker(folder) == "30" and not damaged_names(folder)


def test_a_batch_schedule_starts_again(folder: Path) -> None:
    leave_damage_behind(folder, has_schedule=True)
    flip(folder / "iter_0000030" / "__0_0.distcp")
    with pytest.raises(SystemExit) as end:
        leave_damage_behind(folder, has_schedule=True)
    assert end.value.code == 1 and read_tracker(folder) == "20"


@pytest.mark.parametrize("ranks", [1, 4, 7])
def test_shares_are_equal_and_complete(ranks: int) -> None:
    generator = torch.Generator().manual_seed(3)
    infos, ends = [], [0] * 5
    for number in range(400):
        length = int(torch.randint(1, 10_000, (), generator=generator))
        infos.append(_StorageInfo(f"__{number % 5}_0.distcp", ends[number % 5], length))
        ends[number % 5] += length
    shares = [share_of(infos, rank, ranks) for rank in range(ranks)]
    assert sorted(map(id, infos)) == sorted(id(info) for share in shares for info in share)
    sizes = [sum(info.length for info in share) for share in shares]
    assert max(sizes) <= sum(sizes) / ranks + 10_000  # so 4 ranks take a quarter of the time


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": "other"}, "the run's own folder"),
        ({"load": None}, "the run's own folder"),
        ({"ckpt_step": 4}, "--ckpt-step 4"),
        ({"verify_checksums": False}, "--no-verify-checksums"),
        ({"non_persistent_ckpt_type": "global"}, "lasting checkpoints"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, object], message: str) -> None:
    good = {
        "on_damage": "previous",
        "load": "run",
        "save": "run",
        "ckpt_format": "torch_dist",
        "non_persistent_ckpt_type": None,
        "ckpt_step": None,
        "verify_checksums": True,
    }
    check_on_damage(Namespace(**good))
    with pytest.raises(UserError, match=f"--on-damage previous .*{message}.* Remedy"):
        check_on_damage(Namespace(**good | changes))
    check_on_damage(Namespace(**good | changes | {"on_damage": "fail"}))


def test_a_disk_that_one_rank_does_not_see_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not mounted there, or cannot be read: the checkpoint is not renamed for that."""
    assert damage._find_on_rank(tmp_path, 0, 2)[0] is not None
    message, unseen = damage._find_on_rank(tmp_path, 1, 2)
    assert message is None and unseen is not None and unseen.startswith("rank 1 does not see")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / ".metadata").write_bytes(b"")
    monkeypatch.setattr(damage, "TorchDistReader", refuse)
    for rank in (0, 1):
        message, unseen = damage._find_on_rank(tmp_path, rank, 2)
        assert message is None and unseen is not None and "Permission denied" in unseen
