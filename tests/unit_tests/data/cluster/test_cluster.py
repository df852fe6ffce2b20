"""``prepare-data --engine``: the bytes of one process from tasks, which go on where they stopped.

pip install 'trinity_megatron[cluster]' and python -m pytest tests/unit_tests/data/cluster
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from trinity_megatron.cli.main import main
from trinity_megatron.data.cluster.prepare import group_files
from trinity_megatron.data.prepare import prepare_data
from trinity_megatron.data.sources import SourceFile

ROOT = Path(__file__).resolve().parents[4]
# So many that the split is not enlarged, which encodes twice.
FRACTION = 0.3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in files of very different sizes, code, an empty row and an empty file."""
    folder = tmp_path_factory.mktemp("source") / "text"
    folder.mkdir()
    library = Path(sysconfig.get_path("stdlib")) / "json"
    texts = [path.read_text("utf-8") for path in sorted(library.glob("*.py"))]
    texts += [line for text in texts for line in text.splitlines() if line.strip()]
    rows = [json.dumps({"text": text}) for text in [*texts, "\u00e9\u4e2d", "", "last"]]
    for number, count in enumerate((1, 2, 300, 40, 3, 500, 0)):
        start = 50 * number
        (folder / f"{number}.jsonl").write_text("\n".join(rows[start : start + count]))
    (folder / "rest.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare_data(out, [source], tokenizer=saved, validation_fraction=FRACTION)
    return read_folder(out)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(engine: str, source: Path, tokenizer: Path, out: Path, *flags: str) -> list[str]:
    return [
        *("prepare-data", "--engine", engine, "--source", str(source), "--out", str(out)),
        *("--tokenizer", str(tokenizer), "--validation-fraction", str(FRACTION), *flags),
    ]


def run(flags: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "trinity_megatron.cli", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def need(package: str) -> None:
    pytest.importorskip(package, reason="pip install 'trinity_megatron[cluster]'")


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_on_this_machine(
    workers: int, source: Path, saved: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    need("datatrove")
    result = run(command("local", source, saved, tmp_path / "out", "--workers", str(workers)))
    assert result.returncode == 0, result.stderr
    assert read_folder(tmp_path / "out") == whole
    assert not list(tmp_path.glob(".out.tasks*"))


@pytest.mark.slow
def test_ray(source: Path, saved: Path, tmp_path: Path) -> None:
    need("datatrove")
    need("ray")
    text = tmp_path / "text"  # three tasks: each is a process that imports Megatron
    text.mkdir()
    for name in ("2.jsonl", "5.jsonl", "rest.jsonl"):
        (text / name).write_bytes((source / name).read_bytes())
    prepare_data(tmp_path / "one", [text], tokenizer=saved, validation_fraction=FRACTION)
    flags = ("--workers", "2", "--engine-options", "mem_per_cpu_gb=0")
    result = run(command("ray", text, saved, tmp_path / "out", *flags))
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "one")
    assert not (tmp_path / ".out.tasks").exists()


def test_goes_on_after_a_kill(
    source: Path, saved: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    need("datatrove")
    out, tasks = tmp_path / "out", tmp_path / ".out.tasks"
    flags = command("local", source, saved, out, "--workers", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "trinity_megatron.cli", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if list(tasks.glob("encode-*/completions/0000*")):
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    complete = sorted(tasks.glob("encode-*/completions/0000*"))
    assert complete and not out.exists()
    for folder in ("scan", complete[0].parents[1].name):  # what tasks that are killed leave
        (tasks / folder / ".00001.half").write_bytes(b"half of it")
    again = run(flags)
    assert again.returncode == 0, again.stderr
    total = count_groups(source)
    assert f"going on with {total} tasks" in again.stderr
    # No file is looked at again, and the complete tasks do not run again.
    to_run = re.findall(r"^(\d+) of (\d+) tasks to run", again.stderr, re.MULTILINE)
    missing = total - len(complete)
    assert to_run == ([(str(missing), str(total))] if missing else [])
    assert read_folder(out) == whole
    assert not tasks.exists()


def count_groups(source: Path) -> int:
    return len(group_files([_file(path) for path in sorted(source.iterdir())], 8))


def _file(path: Path, num_bytes: int | None = None) -> SourceFile:
    size = path.stat().st_size if num_bytes is None else num_bytes
    return SourceFile(path.name, path, False, size, 0)


def test_a_bad_row_is_named_and_its_task_runs_again(
    source: Path, saved: Path, tmp_path: Path
) -> None:
    need("datatrove")
    folder = tmp_path / "text"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    good = (folder / "rest.jsonl").read_bytes()
    (folder / "rest.jsonl").write_bytes(b"{no json\n" + good + b"\n{again\n")
    flags = command("local", folder, saved, tmp_path / "out", "--workers", "2")
    result = run(flags)
    assert result.returncode == 2
    assert "rest.jsonl, line 1" in result.stderr and "--skip-bad-rows 1" in result.stderr
    allowed = [*flags, "--skip-bad-rows", "2"]
    assert run(allowed).returncode == 0
    prepare_args = [*allowed[:1], *allowed[3:]]
    prepare_args[prepare_args.index("--out") + 1] = str(tmp_path / "one")
    prepare_args[prepare_args.index("--workers") + 1] = "1"
    assert main(prepare_args) == 0
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "one")


def test_bad_rows_are_counted_over_all_tasks(saved: Path, tmp_path: Path) -> None:
    need("datatrove")
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jsonl").write_text('{"text": "one"}\n{bad\n')
    flags = command("local", folder, saved, tmp_path / "out", "--skip-bad-rows", "3")
    result = run(flags)
    assert result.returncode == 2
    assert "sources have 4 bad rows, more than the 3" in result.stderr
    assert "text/3.jsonl:2" in result.stderr and "--skip-bad-rows 4" in result.stderr


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 9])
def test_files_are_grouped_in_order(num_groups: int) -> None:
    rng = np.random.default_rng(num_groups)
    for _ in range(50):
        sizes = rng.integers(0, 1000, rng.integers(1, 12)) ** 2
        files = [_file(Path(f"{n:02d}"), int(size)) for n, size in enumerate(sizes)]
        groups = group_files(files, num_groups)
        assert [file for group in groups for file in group] == files
        assert all(groups) and len(groups) == min(num_groups, len(files))
        largest = max(sum(file.num_bytes for file in group) for group in groups)
        assert largest <= sizes.sum() / len(groups) + 2 * sizes.max() + len(files)


def test_flags(
    source: Path,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    plain = ["prepare-data", "--source", str(source), "--out", str(out)]
    assert main([*plain, "--engine", "ray"]) == 2
    assert "--engine ray needs --tokenizer" in capsys.readouterr().err
    assert main([*plain, "--engine-options", "a=1"]) == 2
    assert "--engine-options are of --engine" in capsys.readouterr().err
    assert main([*command("local", source, saved, out), "--engine-options", "cpu"]) == 2
    assert "'cpu' is no NAME=VALUE" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    assert main(command("local", source, saved, out)) == 2
    assert "pip install 'trinity_megatron[cluster]'" in capsys.readouterr().err
    assert not out.exists()


def test_options_of_the_executor(
    source: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need("datatrove")
    out = tmp_path / "out"
    assert main([*command("local", source, saved, out), "--engine-options", "colour=1"]) == 2
    error = capsys.readouterr().err
    assert "colour" in error and "LocalPipelineExecutor" in error
