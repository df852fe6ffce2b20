"""A folder that is complete, can be taken up again, or is not there."""

import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trinity_megatron.checkpoint.staging import Staging, fingerprint_folder
from trinity_megatron.errors import UserError

Advance = Callable[[int], None]
# A part that is not told to stop gives up after so many seconds.
PATIENCE = 5


def incomplete(target: Path) -> Path:
    return target.with_name(target.name + ".incomplete")


def write_part(staging: Staging, index: int) -> str:
    (staging.folder / f"{index}.part").write_text(str(index))
    return f"result {index}"


def run(staging: Staging, count: int, work: Callable[[int, Advance], Any]) -> list[Any]:
    return staging.run(work, [1] * count, description="to a test")


def wait_for_stop(advance: Advance) -> None:
    """Work that goes on until another part has failed."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        advance(0)
        time.sleep(0.002)


@pytest.mark.parametrize("exists", [True, False])
def test_target_appears_when_all_is_done(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "new" / "target"
    if exists:
        target.mkdir(parents=True)

    with Staging(target, "source", num_bytes=10) as staging:

        def work(index: int, advance: Advance) -> str:
            assert not target.exists() or not any(target.iterdir())
            advance(1)
            return write_part(staging, index)

        assert not staging.resumed
        assert run(staging, 5, work) == [f"result {i}" for i in range(5)]
        assert not target.exists() or not any(target.iterdir())
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        f"{i}.part": str(i) for i in range(5)
    }
    assert list(target.parent.iterdir()) == [target]


def test_error_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(ZeroDivisionError), Staging(target, "source", num_bytes=10) as staging:
        run(staging, 3, lambda index, advance: write_part(staging, index))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with Staging(target, "source", num_bytes=10) as staging:
        assert not staging.resumed


def test_a_failed_part_stops_the_others(tmp_path: Path) -> None:
    target, finished, running = tmp_path / "target", [], threading.Event()

    def work(index: int, advance: Advance) -> None:
        if index == 1:
            running.wait(PATIENCE)
            raise ArithmeticError("its own words")
        running.set()
        wait_for_stop(advance)
        finished.append(index)

    with (
        pytest.raises(ArithmeticError, match="its own words"),
        Staging(target, "source", num_bytes=10) as staging,
    ):
        run(staging, 20, work)
    assert not finished
    assert not list(tmp_path.iterdir())


def press_ctrl_c() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def interrupt(target: Path, num_done: int) -> None:
    """Finish some parts, then press Ctrl-C while another one is written."""
    done, before = threading.Semaphore(0), set(threading.enumerate())

    with pytest.raises(KeyboardInterrupt), Staging(target, "source", num_bytes=10) as staging:

        def work(index: int, advance: Advance) -> str:
            if index < num_done:
                result = write_part(staging, index)
                done.release()
                return result
            if index == num_done:
                assert all(done.acquire(timeout=PATIENCE) for _ in range(num_done))
                press_ctrl_c()
            wait_for_stop(advance)
            raise AssertionError("not stopped")

        run(staging, num_done + 4, work)
    assert not target.exists()
    started = set(threading.enumerate()) - before
    assert not [thread for thread in started if thread.name.startswith("ThreadPoolExecutor")]


needs_main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="Ctrl-C is told to that one"
)


@needs_main_thread
def test_interrupted_work_is_taken_up_again(tmp_path: Path) -> None:
    target, done = tmp_path / "target", []
    interrupt(target, num_done=3)
    with Staging(target, "source", num_bytes=10) as staging:
        assert staging.resumed

        def work(index: int, advance: Advance) -> str:
            done.append(index)
            return write_part(staging, index)

        assert run(staging, 7, work) == [f"result {i}" for i in range(7)]
    assert sorted(done) == [3, 4, 5, 6]
    assert sorted(path.name for path in target.iterdir()) == [f"{i}.part" for i in range(7)]
    assert list(tmp_path.iterdir()) == [target]


@needs_main_thread
def test_ctrl_c_at_the_very_beginning(tmp_path: Path) -> None:
    outlived: list[int] = []

    def work(index: int, advance: Advance) -> None:
        if index == 0:
            time.sleep(0.01)  # while the other parts, too many to be quick, are still lined up
            press_ctrl_c()
            wait_for_stop(advance)
            outlived.append(index)

    with (
        pytest.raises(KeyboardInterrupt),
        Staging(tmp_path / "target", "source", num_bytes=10) as staging,
    ):
        run(staging, 5000, work)
    assert not outlived


@needs_main_thread
def test_another_source_starts_anew(tmp_path: Path) -> None:
    target, done = tmp_path / "target", []
    interrupt(target, num_done=3)
    with Staging(target, "another source", num_bytes=10) as staging:
        assert not staging.resumed
        assert not list(staging.folder.iterdir())
        run(staging, 2, lambda index, advance: done.append(index))
    assert sorted(done) == [0, 1]
    assert not list(target.iterdir())


@pytest.mark.parametrize("source", ["source", "another source"])
def test_two_at_once(tmp_path: Path, source: str) -> None:
    target = tmp_path / "target"
    with Staging(target, "source", num_bytes=10) as first:
        run(first, 2, lambda index, advance: write_part(first, index))
        with pytest.raises(ValueError, match="is in use: another conversion"):
            with Staging(target, source, num_bytes=10):
                pass
    assert sorted(path.name for path in target.iterdir()) == ["0.part", "1.part"]


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    kept = [tmp_path / "file", tmp_path / "folder" / "file"]
    for path in kept:
        path.write_text("precious")
    for target in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(ValueError, match=f"{target} exists and is not an empty folder"):
            Staging(target, "source", num_bytes=10)
    assert all(path.read_text() == "precious" for path in kept)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_room(tmp_path: Path) -> None:
    size = 2 * shutil.disk_usage(tmp_path).total
    with pytest.raises(UserError, match=rf"target needs {size / 1e9:.2f} GB, but its disk has"):
        with Staging(tmp_path / "target", "source", num_bytes=size):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_only_has_the_name_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "target"
    incomplete(target).mkdir()
    (incomplete(target) / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"target.incomplete, .* holds notes.txt"):
        with Staging(target, "source", num_bytes=10):
            pass
    assert [path.read_text() for path in incomplete(target).iterdir()] == ["precious"]


def test_fingerprint_sees_every_change(tmp_path: Path) -> None:
    file = tmp_path / "file"
    seen = [fingerprint_folder(tmp_path)]
    for text, seconds in (("one", 0), ("one", 1), ("longer", 1)):
        file.write_text(text)
        os.utime(file, (seconds, seconds))
        seen.append(fingerprint_folder(tmp_path))
    file.rename(tmp_path / "other")
    seen.append(fingerprint_folder(tmp_path))
    assert len(set(map(str, seen))) == len(seen)
    assert fingerprint_folder(tmp_path) == seen[-1]


class Call:
    """Pickled as a call of `os.mkdir`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["pickle", b"", b"{", b"[1, 2]", b"7"])
def test_a_marker_of_an_earlier_release_is_begun_anew(tmp_path: Path, content: Any) -> None:
    if content == "pickle":
        content = pickle.dumps([Call(tmp_path / "made")])
    target = tmp_path / "target"
    interrupt(target, num_done=2)
    markers = sorted(incomplete(target).glob("journal/*.done"))
    assert markers
    for marker in markers:
        marker.write_bytes(content)
    with Staging(target, "source", num_bytes=10) as staging:
        assert staging.resumed
        run(staging, 4, lambda index, advance: write_part(staging, index))
    assert not (tmp_path / "made").exists()
    assert len(list(target.iterdir())) == 4
