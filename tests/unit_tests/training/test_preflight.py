"""What a run needs is looked at before its first step."""

import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from trinity_megatron.training import preflight  # noqa: E402
from trinity_megatron.training.preflight import (  # noqa: E402
    check_folders,
    check_space,
    format_bytes,
)

Usage = namedtuple("Usage", "total used free")


def arguments(folder: Path, **values: Any) -> Any:
    names = ("out", "save", "data_cache_path", "tensorboard_dir")
    base = {name: str(folder / name) for name in names} | {"rank": 0, "world_size": 1}
    return SimpleNamespace(**{**base, **values})


def test_folders_are_made(tmp_path: Path) -> None:
    check_folders(arguments(tmp_path, save=None, data_cache_path="s3://bucket/cache"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tensorboard_dir"}
    assert not list(tmp_path.glob("*/*"))
    # Rank 0 writes all but TensorBoard's files, and the last rank those.
    blocked = tmp_path / "file"
    blocked.write_text("")
    check_folders(arguments(tmp_path / "a", tensorboard_dir=str(blocked), world_size=2))
    check_folders(arguments(tmp_path / "b", save=str(blocked), rank=1, world_size=2))
    assert not (tmp_path / "b" / "out").exists()


@pytest.mark.parametrize("name", ["out", "save", "data_cache_path", "tensorboard_dir"])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "File exists"),
        ("file/below", "Not a directory"),
        ("/proc/self/fdinfo", ""),  # where root cannot write either
        ("/sys/kernel/new", ""),
    ],
)
def test_folders_that_cannot_be_written(name: str, place: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / place)
    with pytest.raises(ValueError) as caught:
        check_folders(arguments(tmp_path, **{name: folder}))
    flag = f"--{name.replace('_', '-')}"
    assert f"{flag} {folder} cannot be written: {reason}" in str(caught.value)
    assert "Remedy: mend that, or name another folder" in str(caught.value)


def test_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", small])
    if mounted.returncode:
        pytest.skip("needs root")
    try:
        with pytest.raises(ValueError, match="--save .* cannot be written: No space left"):
            check_folders(arguments(tmp_path, save=str(small)))
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("total", "free", "outcome"),
    [
        (100_000, 50_000, "nothing"),
        (100_000, 3000, "nothing"),
        (100_000, 2999, "warning"),
        (100_000, 0, "warning"),
        (2999, 2999, "error"),
        (0, 0, "nothing"),  # as some network filesystems say
    ],
)
def test_space_for_a_checkpoint(
    total: int,
    free: int,
    outcome: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(preflight, "checkpoint_bytes", lambda args: 3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(total, total - free, free))
    args = arguments(tmp_path)
    if outcome == "error":
        with pytest.raises(ValueError, match=r"takes about 3 kB, .* are free. Remedy: another"):
            check_space(args)
        return
    check_space(args)
    shown = capsys.readouterr().out
    assert ("> WARNING: --save" in shown and "takes about 3 kB" in shown) == (outcome == "warning")
    check_space(arguments(tmp_path, save=None))
    check_space(arguments(tmp_path, save="s3://bucket/run"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (2_548_758, "2.55 MB"),
        (7_000_000_000, "7 GB"), (4_000_000_000_000, "4 TB"),

    ],
)  # fmt: skip
def test_bytes_in_words(number: int, text: str) -> None:
    assert format_bytes(number) == text
