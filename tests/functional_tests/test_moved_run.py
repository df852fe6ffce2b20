"""The folder of a run is moved, its data are moved, lost, or replaced by others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.launch import SMALL, environment
from tests.unit_tests.parallel_state import one_rank_world
from trinity_megatron.checkpoint.convert import megatron_to_hf
from trinity_megatron.data.prepare import prepare_data
from trinity_megatron.evaluation.generate import generate

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def run(folder: Path, ranks: int, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--nproc", str(ranks)]
    return subprocess.run(
        [*command, *SMALL, "--data", "data", "--out", "run", *flags],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_screen(ended: subprocess.CompletedProcess[str], log: Path) -> None:
    """One line a step beside at most 40, and upstream's output in the log."""
    lines = ended.stdout.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 2 and all("MaxVio" in line for line in steps), ended.stdout
    assert len(lines) - len(steps) <= 40 and not ended.stderr, ended.stdout + ended.stderr
    assert max(map(len, steps)) < 100
    text = log.read_text()
    assert "iteration        2/       4" in text and "lm loss" in text
    assert not any("iteration " in line or "WARNING" in line for line in lines)


def test_a_run_that_moves(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copytree(data, here / "data")
    first = run(here, 1, "--train-iters", "4", "--exit-interval", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    check_screen(first, here / "run" / "logs" / "rank_00000.log")

    # The run alone, without its data.
    there.mkdir()
    (here / "run").rename(there / "run")
    shutil.rmtree(here / "data")
    monkeypatch.chdir(there)
    checkpoints = Path("run/checkpoints")
    with one_rank_world(tmp_path / "store"):
        assert generate(checkpoints, "import ", max_new_tokens=2)
    megatron_to_hf(checkpoints, Path("hf"))
    made = (there / "hf" / "tokenizer.json").read_bytes()
    assert made == (data / "tokenizer" / "tokenizer.json").read_bytes()

    # Other data in the place of the old ones: refused on both ranks, and said once.
    text = tmp_path / "other.jsonl"
    lines = (
        json.dumps({"text": f"document {number} of another text. " * 9}) for number in range(500)
    )
    text.write_text("\n".join(lines))
    prepare_data(there / "data", [text], tokenizer=data / "tokenizer")
    other = run(there, 2, "--train-iters", "4")
    assert other.returncode != 0
    assert other.stderr.count("error: --load run/checkpoints was trained on other data") == 1
    assert "Traceback" not in other.stdout + other.stderr

    # The data are back, though from elsewhere: the index is not made again.
    index = {path.name for path in (there / "run" / "data_cache").glob("*.npy")}
    shutil.move(there / "data", there / "other")
    shutil.copytree(data, there / "data")
    last = run(there, 1, "--train-iters", "4")
    assert last.returncode == 0, last.stdout + last.stderr
    assert {path.name for path in (there / "run" / "data_cache").glob("*.npy")} == index
