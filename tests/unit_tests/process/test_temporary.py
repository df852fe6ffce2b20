"""A temporary folder in which a checkpoint can be saved, whatever TMPDIR says."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trinity_megatron.process import temporary
from trinity_megatron.process.temporary import use_short_temporary_folder, why_unusable


@pytest.fixture(autouse=True)
def keep_own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, "")
    yield
    tempfile.tempdir = None


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as path:
        yield Path(path)


def make_long(folder: Path, length: int) -> Path:
    """A folder whose path has so many characters."""
    while (missing := length - len(str(folder)) - 1) > 0:
        folder /= "a" * min(missing, 100)
    folder.mkdir(parents=True)
    assert len(str(folder)) == length
    return folder


@pytest.mark.parametrize("length", [20, 60, 74, 75, 76, 100, 131, 400])
def test_exactly_the_folders_that_take_a_socket(length: int, short: Path) -> None:
    """107 bytes are what multiprocessing's ``/pymp-12345678/listener-12345678`` may have."""
    folder = make_long(short, length)
    reason = why_unusable(str(folder))
    assert (reason is None) == (length + 32 <= 107), reason
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["TMPDIR", "TEMP", "TMP"])
def test_a_manager_starts(
    name: str, short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = str(make_long(short, 131))
    monkeypatch.setenv(name, given)
    use_short_temporary_folder()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp"
    said = capsys.readouterr().err
    assert f"> {name} {given} is too long for a socket (131 bytes); /tmp is used\n" == said
    with multiprocessing.get_context("fork").Manager() as manager:
        queue = manager.Queue()
        queue.put(3)
        assert queue.get() == 3
    use_short_temporary_folder()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["missing", "file", "not writable", "full"])
def test_a_folder_that_cannot_be_used(
    kind: str, short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = short / "folder"
    if kind == "file":
        folder.write_text("")
    elif kind == "not writable":
        folder = Path("/proc/self")  # for root too
    elif kind == "full":
        folder = Path("/dev/full")
    monkeypatch.setenv("TMPDIR", str(folder))
    use_short_temporary_folder()
    assert os.environ["TMPDIR"] == "/tmp"
    assert f"> TMPDIR {folder} " in capsys.readouterr().err


def test_none_can_be_used(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "_OTHERS", (str(short / "gone"),))
    monkeypatch.setenv("TMPDIR", str(make_long(short, 131)))
    with pytest.raises(ValueError, match=r"TMPDIR: no temporary .*131 bytes.*Remedy: TMPDIR="):
        use_short_temporary_folder()


def test_a_good_folder_stays(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_short_temporary_folder()
    assert not os.environ["TMPDIR"]
    monkeypatch.setenv("TMPDIR", str(short))
    use_short_temporary_folder()
    assert os.environ["TMPDIR"] == str(short)
