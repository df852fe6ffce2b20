"""What a save that the disk refuses says, and what it leaves."""

import errno
import os
import pickle
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.training import global_vars, training  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from trinity_megatron.errors import MachineError, UserError  # noqa: E402
from trinity_megatron.process.alarms import Alarms  # noqa: E402
from trinity_megatron.training.callbacks import disk_errors, save_errors  # noqa: E402
from trinity_megatron.training.callbacks.callback import callbacks_in_training_loop  # noqa: E402
from trinity_megatron.training.callbacks.disk_errors import (  # noqa: E402
    explain_disk_error,
    find_reason,
)
from trinity_megatron.training.callbacks.save_errors import named_save_errors  # noqa: E402

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's arguments, as far as they are read; a checkpoint takes 3 MB."""
    save = tmp_path / "checkpoints"
    save.mkdir()
    args = SimpleNamespace(
        save=str(save), load=str(save), iteration=0, finetune=False, async_save=False, rank=0,
        ckpt_format="torch_dist", non_persistent_ckpt_type="global",
        non_persistent_global_ckpt_dir=None, on_failed_save="fail", train_iters=100,
    )  # fmt: skip
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    monkeypatch.setattr(disk_errors, "checkpoint_bytes", lambda args: 3_000_000)
    return args


def failure_of_a_rank(error: BaseException) -> CheckpointException:
    """As rank 0 gets it from another rank: by pickle, without the causes."""
    sent = pickle.loads(pickle.dumps(RuntimeError(f"Worker failure: {error}")))
    try:
        raise sent
    except RuntimeError as caught:
        return CheckpointException("write", {1: (caught, traceback.extract_tb(None))})


def chained(cause: BaseException) -> RuntimeError:
    error = RuntimeError("PytorchStreamWriter failed")
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, errno.ENOSPC),
        (OSError(errno.EDQUOT, "over"), errno.EDQUOT),
        (PermissionError(errno.EACCES, "no", "SAVE/iter_0000002/.metadata"), errno.EACCES),
        (FileNotFoundError(errno.ENOENT, "gone", "SAVE/iter_0000002/__0_0.distcp"), errno.ENOENT),
        (failure_of_a_rank(FileNotFoundError(errno.ENOENT, "gone", "SAVE/x")), errno.ENOENT),
        (OSError(errno.EROFS, "read-only"), errno.EROFS),
        (OSError(errno.EIO, "broken"), errno.EIO),
        (OSError(errno.ESTALE, "gone"), errno.ESTALE),
        (failure_of_a_rank(FULL), errno.ENOSPC),
        (failure_of_a_rank(OSError(errno.EFBIG, "too large")), errno.EFBIG),
        (chained(FULL), errno.ENOSPC),
        # Not the disk, which takes a probe.
        (FileNotFoundError(errno.ENOENT, "gone", "/tmp/pymp-x/listener-y"), None),
        (RuntimeError("CUDA error: device-side assert"), None),
        (failure_of_a_rank(KeyError("weight")), None),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
        (AssertionError("Unmatched async calls"), None),
        (TypeError("[Errno nothing]"), None),
    ],
)
def test_the_reason(
    error: BaseException, reason: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("SAVE").mkdir()
    assert find_reason(error, Path("SAVE")) == reason


def test_an_error_without_a_number_is_probed(tmp_path: Path) -> None:
    """torch.save to a full disk: only the disk itself says why."""
    error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert find_reason(error, tmp_path) == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert find_reason(error, tmp_path) is None
    assert find_reason(error, tmp_path / "gone") == errno.ENOENT
    assert not list(tmp_path.iterdir())


@contextmanager
def saves_of_the_loop() -> Iterator[None]:
    with named_save_errors(Alarms()) as callback, callbacks_in_training_loop([callback]):
        yield


def save_with(
    error: BaseException | None, monkeypatch: pytest.MonkeyPatch, *, at: int | None = None
) -> None:
    """Saves of Megatron's, of which that of a step (None: each) leaves half of it and fails."""

    def save(iteration: int, *given: Any, **settings: Any) -> None:
        args = global_vars.get_args()
        folder = Path(args.save)
        if settings.get("non_persistent_ckpt"):
            folder /= "non_persistent"
        (folder / f"iter_{iteration:07d}").mkdir(parents=True)
        (folder / f"iter_{iteration:07d}" / "__0_0.distcp").write_bytes(b"half")
        if error is not None and at in (None, iteration):
            raise error
        (folder / TRACKER).write_text(str(iteration))

    monkeypatch.setattr(training, "save_checkpoint", save)


@pytest.mark.parametrize("error", [FULL, failure_of_a_rank(FULL)])
def test_a_full_disk(args: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    save_with(None, monkeypatch)
    with saves_of_the_loop():
        training.save_checkpoint(2, [], None)
    save_with(error, monkeypatch)
    with saves_of_the_loop(), pytest.raises(ValueError) as caught:
        training.save_checkpoint(4, [], None)
    message = str(caught.value)
    assert message.startswith(f"the save of step 4 to {args.save} failed: No space left on device")
    for words in ("are free there", "takes about 3 MB", "The checkpoint of step 2 stands"):
        assert words in message
    assert "Remedy: make space there; the same command then goes on" in message
    names = {path.name for path in Path(args.save).iterdir()}
    assert names == {"iter_0000002", TRACKER}


def test_nothing_stands_yet(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_with(OSError(errno.EDQUOT, "over"), monkeypatch)
    with saves_of_the_loop(), pytest.raises(ValueError, match=r"None stands.*raise the quota"):
        training.save_checkpoint(7, [], None)
    assert list(Path(args.save).iterdir()) == []


def test_another_folder(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_with(FULL, monkeypatch)
    with saves_of_the_loop(), pytest.raises(ValueError, match=r"non_persistent failed: No space"):
        training.save_checkpoint(3, [], None, non_persistent_ckpt=True)


@pytest.mark.parametrize(
    "error", [TypeError("ours"), KeyboardInterrupt(), SystemExit(3), CheckpointException("x", {})]
)
def test_what_is_not_the_disk_is_as_it_was(
    args: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    save_with(error, monkeypatch)
    with saves_of_the_loop(), pytest.raises(type(error)) as caught:
        training.save_checkpoint(1, [], None)
    assert caught.value is error
    assert (Path(args.save) / "iter_0000001").exists()


def test_other_ranks_leave_the_word_to_rank_0(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args.rank = 1
    save_with(CheckpointException("write", {}), monkeypatch)
    # No UserError: whoever starts the run again goes by what rank 0 says.
    with saves_of_the_loop(), pytest.raises(MachineError, match=r"step 5 failed; rank 0 says why"):
        training.save_checkpoint(5, [], None)
    assert (Path(args.save) / "iter_0000005").exists()


def test_a_killed_process_that_writes(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("the process that writes for rank 1 was ended by SIGKILL")
    save_with(failure_of_a_rank(error), monkeypatch)
    with saves_of_the_loop(), pytest.raises(MachineError, match=r"rank 1 was ended by SIGKILL\. N"):
        training.save_checkpoint(5, [], None)
    assert not (Path(args.save) / "iter_0000005").exists()


def test_the_training_goes_on(
    args: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args.on_failed_save = "continue"
    save_with(failure_of_a_rank(FULL), monkeypatch, at=4)
    with saves_of_the_loop():
        for step in (2, 4, 6):  # a later one is there: all is well
            training.save_checkpoint(step, [], None)
    names = {path.name for path in Path(args.save).iterdir()}
    assert names == {"iter_0000002", "iter_0000006", TRACKER}
    words = capsys.readouterr().out
    assert words.count("> WARNING: the save of step 4 to") == 1
    assert words.count("latest checkpoint. The training goes on (--on-failed-save continue)") == 1


@pytest.mark.parametrize("end", [None, SystemExit(0)])
def test_an_end_without_its_save_is_no_end(
    end: SystemExit | None,
    args: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args.on_failed_save = "continue"
    save_with(failure_of_a_rank(FULL), monkeypatch, at=100)
    words = r"save of step 100 .* No space left .* step 50 stands. Remedy: make space"
    with pytest.raises(UserError, match=words), saves_of_the_loop():
        training.save_checkpoint(50, [], None)
        training.save_checkpoint(100, [], None)
        if end:
            raise end
    assert "goes on" not in capsys.readouterr().out  # it does not


@pytest.mark.parametrize("is_full", [False, True])
def test_a_disk_without_space_is_not_tried(
    is_full: bool, args: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args.on_failed_save = "continue"
    save_with(None, monkeypatch)
    if is_full:
        monkeypatch.setattr(disk_errors, "checkpoint_bytes", lambda args: 10**18)
    else:  # read-only, or over a quota
        monkeypatch.setattr(disk_errors, "probe", lambda folder: errno.EROFS)
    with pytest.raises(UserError, match="step 4"), saves_of_the_loop():
        training.save_checkpoint(4, [], None)
    assert not (Path(args.save) / "iter_0000004").exists()
    reason = "No space left on device" if is_full else "Read-only file system"
    assert f"the save of step 4 to {args.save} failed: {reason}" in capsys.readouterr().out


def test_what_one_rank_alone_knows_ends_the_run(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args.on_failed_save = "continue"
    save_with(FULL, monkeypatch)  # no CheckpointException: the other ranks wait
    with saves_of_the_loop(), pytest.raises(UserError, match="step 4"):
        training.save_checkpoint(4, [], None)


def test_one_of_several_asynchronous_saves(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args.async_save, args.on_failed_save = True, "continue"
    ended = [failure_of_a_rank(FULL), None]
    monkeypatch.setattr(save_errors, "is_empty_async_queue", lambda: not ended)

    def finalize(blocking: bool = False) -> None:
        while ended:
            if error := ended.pop(0):
                raise error
            (Path(args.save) / TRACKER).write_text("4")

    save_with(None, monkeypatch)
    monkeypatch.setattr(training, "maybe_finalize_async_save", finalize)
    with saves_of_the_loop():
        for step in (2, 4):
            training.save_checkpoint(step, [], None)
        (Path(args.save) / TRACKER).unlink()  # neither is complete yet
        training.maybe_finalize_async_save(blocking=True)
        assert not ended
    assert {path.name for path in Path(args.save).iterdir()} == {"iter_0000004", TRACKER}


def test_an_asynchronous_save(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that is not complete is named when it is finalized, steps later."""
    args.async_save = True
    monkeypatch.setattr(save_errors, "is_empty_async_queue", lambda: False)

    def finalize(blocking: bool = False) -> None:
        if blocking:
            raise failure_of_a_rank(FULL)

    save_with(None, monkeypatch)
    monkeypatch.setattr(training, "maybe_finalize_async_save", finalize)
    with saves_of_the_loop():
        for step in (2, 4, 6):
            training.save_checkpoint(step, [], None)
        (Path(args.save) / TRACKER).write_text("2")
        training.maybe_finalize_async_save()
        with pytest.raises(ValueError, match=r"save of step 4 .* step 2 stands"):
            training.maybe_finalize_async_save(blocking=True)
    assert {path.name for path in Path(args.save).iterdir()} == {"iter_0000002", TRACKER}


def test_a_step_that_was_loaded_is_not_written_again(
    args: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk would spoil the only copy."""
    save_with(FULL, monkeypatch)
    args.iteration = 40
    with saves_of_the_loop():
        training.save_checkpoint(40, [], None)
        with pytest.raises(ValueError, match="step 41"):
            training.save_checkpoint(41, [], None)
        args.load = args.load + "-other"
        with pytest.raises(ValueError, match="step 40"):
            training.save_checkpoint(40, [], None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "run/progress.txt"),
            "progress.txt cannot",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "a file cannot be written or read: Disk"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), None),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), None),
        (OSError("AF_UNIX path too long"), None),
    ],
)
def test_a_disk_that_refuses_another_file(error: OSError, words: str | None) -> None:
    message = explain_disk_error(error)
    assert (message is None) == (words is None)
    assert words is None or words in str(message) and "Remedy: make space" in str(message)


def test_megatron_is_as_before() -> None:
    before = training.save_checkpoint, training.maybe_finalize_async_save
    with saves_of_the_loop():
        assert training.save_checkpoint is not before[0]
    assert (training.save_checkpoint, training.maybe_finalize_async_save) == before
