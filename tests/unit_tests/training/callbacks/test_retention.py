"""``--keep-last``: which checkpoints are deleted, and which never."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.training.test_resume import save
from trinity_megatron.checkpoint.torch_dist.tracker import TRACKER_NAME
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.training import checkpointing, training  # noqa: E402

from trinity_megatron.training.arguments.value_ranges import check_keep_last  # noqa: E402
from trinity_megatron.training.callbacks import retention  # noqa: E402
from trinity_megatron.training.callbacks.callback import callbacks_in_training_loop  # noqa: E402
from trinity_megatron.training.callbacks.retention import (  # noqa: E402
    choose_old,
    delete_old,
    old_checkpoints_deleted,
    token_periods,
)
from trinity_megatron.training.resume import find_newest  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def folder(one_rank: None, tmp_path: Path) -> Path:
    """Checkpoints of steps 10 to 50, a release, the tokenizer's stamp."""
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    (tmp_path / "release").mkdir()
    (tmp_path / "tokenizer.sha256").write_text("1")
    return tmp_path


def track(folder: Path, word: object) -> None:
    (folder / TRACKER_NAME).write_text(str(word))


def iterations(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("iter_*"))


def test_the_newest_are_kept(folder: Path) -> None:
    assert delete_old(folder, 2) == [30, 20, 10]
    assert iterations(folder) == [40, 50]
    assert (folder / "release").is_dir() and (folder / "tokenizer.sha256").is_file()
    assert not list(folder.glob("deleting_*"))
    assert delete_old(folder, 2) == []


def spoil(folder: Path, step: int) -> None:
    (folder / f"iter_{step:07d}" / ".metadata").unlink()


def cut(folder: Path, step: int) -> None:
    next((folder / f"iter_{step:07d}").glob("__0_*.distcp")).unlink()


@pytest.mark.parametrize("damage", [spoil, cut])
def test_damaged_ones_do_not_count(damage: Any, folder: Path) -> None:
    for step in (30, 40):
        damage(folder, step)
    assert choose_old(folder, 2) == [10]  # 50 and 20 are complete
    damage(folder, 50)
    assert choose_old(folder, 1) == [10]  # the tracker names 50
    for step in (10, 20):
        damage(folder, step)
    assert choose_old(folder, 1) == []


@pytest.mark.parametrize(
    ("keep", "word", "expected"),
    [
        (5, 50, []),
        (9, 50, []),
        (1, 50, [40, 30, 20, 10]),
        (1, 30, [20, 10]),  # a branch from step 30: what lies after it stands
        (2, 30, [10]),
        (1, "release", []),
        (1, "", []),
        (1, 70, [40, 30, 20, 10]),
    ],
)
def test_what_the_tracker_names(keep: int, word: object, expected: list[int], folder: Path) -> None:
    track(folder, word)
    assert choose_old(folder, keep) == expected


def test_the_first_of_every_so_many_tokens_stays(one_rank: None, tmp_path: Path) -> None:
    # Batches of 8 sequences of 64 tokens, and of 16 from step 25 on: 512 and 1024 tokens a step.
    args = Namespace(keep_every="10K", seq_length=64, step_batch_size_schedule=f"0:8 {25 * 512}:16")
    period_of = token_periods(args)
    tokens = {step: min(step, 25) * 512 + max(step - 25, 0) * 1024 for step in range(100)}
    assert all(period_of(step) == tokens[step] // 10_000 for step in tokens)
    left: list[int] = []
    for step in range(5, 55, 5):  # as a run saves and deletes
        save(tmp_path, step)
        delete_old(tmp_path, 2, period_of=period_of)
        left = iterations(tmp_path)
    crossing = [s for s in range(5, 50, 5) if tokens[s] // 10_000 > tokens[s - 5] // 10_000]
    assert crossing == [20, 35, 45]
    assert left == [20, 35, 45, 50]


def test_multiples_of_the_retain_interval_stay(folder: Path) -> None:
    assert delete_old(folder, 1, interval=20) == [30, 10]
    assert iterations(folder) == [20, 40, 50]


def test_links_stay(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (folder / "iter_0000010").rename(elsewhere)
    (folder / "iter_0000010").symlink_to(elsewhere)
    assert delete_old(folder, 1) == [40, 30, 20]
    assert (elsewhere / ".metadata").is_file() and (folder / "iter_0000010").is_symlink()


def test_a_kill_in_the_middle_leaves_no_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", die)
        delete_old(folder, 3)
    assert iterations(folder) == [30, 40, 50] and find_newest(folder) == 50
    assert len(list(folder.glob("deleting_*"))) == 2
    delete_old(folder, 3)
    assert not list(folder.glob("deleting_*"))


def run(folder: Path, **given: Any) -> Namespace:
    values = {"save": str(folder), "rank": 0, "keep_last": 2, "save_retain_interval": None}
    values["keep_every"] = None
    return Namespace(**{**values, "ckpt_format": "torch_dist", **given})


def test_after_each_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "save_checkpoint", lambda step, *given: save(folder, step))
    before = checkpointing._async_delete_checkpoint_impl
    with old_checkpoints_deleted(run(folder)) as callback, callbacks_in_training_loop([callback]):
        assert checkpointing._async_delete_checkpoint_impl is not before
        for step in (60, 70):
            training.save_checkpoint(step, [], None)  # type: ignore[call-arg]
    assert iterations(folder) == [60, 70]
    assert checkpointing._async_delete_checkpoint_impl is before


@pytest.mark.parametrize("given", [{"rank": 1}, {"keep_last": None}])
def test_only_rank_0_and_only_if_asked(
    given: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "save_checkpoint", lambda step, *given: save(folder, step))
    with (
        old_checkpoints_deleted(run(folder, **given)) as callback,
        callbacks_in_training_loop([callback]),
    ):
        training.save_checkpoint(60, [], None)  # type: ignore[call-arg]
    assert iterations(folder) == [10, 20, 30, 40, 50, 60]


def test_a_failure_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(training, "save_checkpoint", lambda step, *given: save(folder, step))
    monkeypatch.setattr(shutil, "rmtree", fail)
    with old_checkpoints_deleted(run(folder)) as callback, callbacks_in_training_loop([callback]):
        for step in (60, 70, 80):
            training.save_checkpoint(step, [], None)  # type: ignore[call-arg]
    said = [r.getMessage() for r in caplog.records if "--keep-last" in r.getMessage()]
    assert len(said) == 1 and "Permission denied" in said[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep_every": "10X"}, "--keep-every 10X"),
        ({"keep_every": "10B", "keep_last": None}, "--keep-every 10B without --keep-last"),
        ({"keep_last": 0}, "--keep-last 0"),
        ({"keep_last": -3}, "--keep-last -3"),
        ({"save": None}, "--save is None"),
        ({"save": "msc://bucket/run"}, "msc://bucket/run"),
        ({"ckpt_format": "torch"}, "--ckpt-format torch"),
    ],
)
def test_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Remedy: ") as error:
        check_keep_last(run(tmp_path, **given))
    assert words in str(error.value)


def test_the_first_complete_one_of_a_period_stays() -> None:
    """A save that was cut off is not what is kept of its period."""
    found = retention.first_of_periods(
        [400, 487, 500, 600, 900], lambda number: number // 450, lambda number: number != 487
    )
    assert found == {500, 900}
