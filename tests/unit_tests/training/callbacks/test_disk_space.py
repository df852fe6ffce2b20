"""A disk that will be full is said a day before."""

import shutil
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from trinity_megatron.training.callbacks.disk_space import DiskSpace, folder_bytes  # noqa: E402

Usage = namedtuple("Usage", "total used free")
HOUR, SIZE = 3600.0, 1000


def save_steps(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    free: list[int],
    hours: float,
    keep_last: int | None = None,
    train_iters: int = 10_000,
) -> dict[int, str]:
    """What is said after saves at steps 10, 20, ... that leave so many checkpoints' space."""
    times, said = iter(hours * HOUR * n for n in range(100)), {}
    args = Namespace(
        save=str(folder),
        keep_last=keep_last,
        train_iters=train_iters,
        save_interval=10,
        save_retain_interval=None,
        keep_every=None,
    )
    callback = DiskSpace(args, clock=lambda: next(times))
    for number, left in enumerate(free, start=1):
        made = folder / f"iter_{10 * number:07d}"
        (made / "inner").mkdir(parents=True)
        (made / "shard").write_bytes(bytes(SIZE - 1))
        (made / "inner" / "file").write_bytes(b"x")
        if keep_last:  # deletes behind the save
            shutil.rmtree(folder / f"iter_{10 * (number - keep_last):07d}", ignore_errors=True)
        usage = Usage(1000 * SIZE, 0, left * SIZE + SIZE // 2)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        callback.on_checkpoint_save_end(10 * number)
        if words := capsys.readouterr().err:
            said[10 * number] = words
    assert folder_bytes(made) == SIZE
    return said


type Fixtures = tuple[Path, pytest.MonkeyPatch, pytest.CaptureFixture[str]]


@pytest.fixture
def around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Fixtures:
    return tmp_path, monkeypatch, capsys


def test_it_is_said_once_and_a_day_before(around: Fixtures) -> None:
    said = save_steps(*around, free=[7, 6, 5, 4, 3, 2], hours=5)
    assert list(said) == [40]  # 4 saves of 5 hours are left
    assert "1 kB" in said[40] and "after 4 more saves it is full" in said[40]
    assert "Remedy: make space" in said[40]


def test_the_next_save_fails(around: Fixtures) -> None:
    assert "the next save will fail" in save_steps(*around, free=[0], hours=5)[10]


def test_space_that_was_made_is_noticed(around: Fixtures) -> None:
    assert list(save_steps(*around, free=[2, 2, 50, 2], hours=5)) == [20, 40]


def test_a_run_that_ends_before(around: Fixtures) -> None:
    assert not save_steps(*around, free=[3, 2, 1, 0], hours=1, train_iters=40)
    # What the last save needs is there.


def test_old_ones_are_deleted(around: Fixtures) -> None:
    # Two are kept, a third is there while it is written.
    assert not save_steps(*around, free=[3, 2, 1, 1, 1], hours=1, keep_last=2)


def test_no_space_for_the_one_that_is_written(around: Fixtures) -> None:
    said = save_steps(*around, free=[3, 2, 0], hours=1, keep_last=2)
    assert list(said) == [30]
