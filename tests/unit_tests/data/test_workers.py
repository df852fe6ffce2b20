"""``prepare-data --workers``: the same bytes from any number of processes, and none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from trinity_megatron.cli.main import main
from trinity_megatron.data.encode_pool import encode_batches
from trinity_megatron.data.prepare import prepare_data
from trinity_megatron.data.tokenizer import END_OF_TEXT, encode_documents
from trinity_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def read_folder(folder: Path) -> dict[str, bytes]:
    """All files of a prepared folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of code, and one large file of rows, with documents of very different lengths."""
    folder = tmp_path_factory.mktemp("source") / "text"
    folder.mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text("utf-8") for path in sorted((library / "json").glob("*.py"))]
    texts += [line for text in texts for line in text.splitlines() if line.strip()]
    rows = [json.dumps({"text": text}) for text in [*texts, "\u00e9\u4e2d", "", "last"]]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "more.jsonl").write_text("\n".join(rows[:100]))
    return folder


def test_bytes_do_not_depend_on_the_workers(source: Path, saved: Path, tmp_path: Path) -> None:
    found = {}
    for workers in (None, 1, 2, 7):
        out = tmp_path / str(workers)
        prepare_data(out, [source], tokenizer=saved, workers=workers)
        found[workers] = read_folder(out)
    assert found[None] and all(files == found[None] for files in found.values())


def test_a_trained_tokenizer_too(source: Path, tmp_path: Path) -> None:
    for workers in (None, 2):
        prepare_data(tmp_path / str(workers), [source], vocab_size=400, workers=workers)
    assert read_folder(tmp_path / "2") == read_folder(tmp_path / "None")


def test_batches_are_read_a_few_ahead(tokenizer: Tokenizer) -> None:
    read = []

    def batches() -> Iterator[list[str]]:
        for number in range(50):
            read.append(number)
            yield [f"text {number}", ""]

    encoded = encode_batches(
        batches(), tokenizer, eos_token=END_OF_TEXT, dtype=np.uint16, workers=2
    )
    for number, (tokens, lengths) in enumerate(encoded):
        assert len(read) <= number + 1 + 2 * 2
        expected = encode_documents(tokenizer, [f"text {number}", ""])
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.tolist() == [token for ids in expected for token in ids]
        assert tokens.dtype == np.uint16


def test_a_killed_worker_is_named(tokenizer: Tokenizer) -> None:
    def batches() -> Iterator[list[str]]:
        for number in range(10_000):
            if number == 10:
                os.kill(children_of(os.getpid())[-1], signal.SIGKILL)
            yield ["some text"]

    with pytest.raises(UserError, match="--workers 2: a process that encodes was killed"):
        for _ in encode_batches(
            batches(), tokenizer, eos_token=END_OF_TEXT, dtype=np.uint16, workers=2
        ):
            pass


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return sorted(found)


def test_again_after_a_kill(source: Path, saved: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_data(whole, [source], tokenizer=saved)
    command = [sys.executable, "-m", "trinity_megatron.cli", "prepare-data", "--out", str(out)]
    command += ["--source", str(source), "--tokenizer", str(saved), "--workers", "2"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    workers: list[int] = []
    while len(workers) < 2 and process.poll() is None and time.monotonic() < deadline:
        workers = children_of(process.pid)
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    assert not out.exists()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "workers outlive a kill"
    prepare_data(out, [source], tokenizer=saved, workers=2)
    assert read_folder(out) == read_folder(whole)
    assert not list(tmp_path.glob(".out.building-*"))


def test_flags(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare-data", "--out", str(tmp_path / "out"), "--source", str(source)]
    assert main([*command, "--workers", "0"]) == 2
    assert "--workers 0 is below 1" in capsys.readouterr().err
    assert main([*command, "--workers", "2", "--chat", "--tokenizer", "T"]) == 2
    assert "--workers does not go with --chat" in capsys.readouterr().err
