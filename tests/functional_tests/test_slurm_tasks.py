"""``prepare-data --engine slurm`` on a real Slurm: job arrays make the bytes of one process.

pip install 'trinity_megatron[cluster]', apt-get install slurm-wlm, and
python -m pytest tests/functional_tests/test_slurm_tasks.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.functional_tests.launch import ROOT, environment
from tests.functional_tests.slurm import logs_of, one_node, why_not
from trinity_megatron.data.prepare import prepare_data

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_bytes_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="pip install 'trinity_megatron[cluster]'")
    if reason := why_not():
        pytest.skip(reason)
    source, slurm_folder = tmp_path / "text", tmp_path / "slurm"
    source.mkdir()
    slurm_folder.mkdir()
    library = Path(sysconfig.get_path("stdlib")) / "json"
    lines = [line for path in sorted(library.glob("*.py")) for line in path.open() if line.strip()]
    for number in range(2):
        rows = [json.dumps({"text": line}) for line in lines[number::2]]
        (source / f"{number}.jsonl").write_text("\n".join(rows))
    prepare_data(tmp_path / "first", [source], vocab_size=400, validation_fraction=0.3)
    tokenizer = tmp_path / "first" / "tokenizer"
    prepare_data(tmp_path / "one", [source], tokenizer=tokenizer, validation_fraction=0.3)
    command = [sys.executable, "-m", "trinity_megatron.cli", "prepare-data", "--engine", "slurm"]
    command += ["--source", str(source), "--out", str(tmp_path / "out"), "--workers", "2"]
    command += ["--tokenizer", str(tokenizer), "--validation-fraction", "0.3"]
    command += ["--engine-options", "partition=low", "time=00:30:00", "mem_per_cpu_gb=1"]
    with one_node(slurm_folder) as slurm:
        done = subprocess.run(
            command,
            env={**environment(), **slurm.variables, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr[-3000:] + logs_of(slurm_folder)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "one")
