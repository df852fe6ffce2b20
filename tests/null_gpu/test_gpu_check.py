"""``gpu-check`` on a device that computes nothing: what needs no values, and what it says of it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.launch import ROOT

pytestmark = [pytest.mark.null_gpu, pytest.mark.slow]
# The others hold values to bounds, or train what takes minutes to launch here.
PARTS = ("environment", "fp8_loss")


@pytest.fixture(scope="module")
def rows(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The cells of all tables of the report."""
    out: Path = tmp_path_factory.mktemp("suite")
    report = out / "report.md"
    command = [sys.executable, "-m", "trinity_megatron.cli", "gpu-check", "--out", str(out / "out")]
    command += ["--report", str(report), "--parts", ",".join(PARTS)]
    environment = {**variables, "NULL_GPU_CAPABILITY": "103"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in report.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_it_names_the_device(rows: list[list[str]]) -> None:
    assert ["compute capability", "10.3"] in rows
    assert [row[1] for row in rows if row[0] == "environment"] == ["passed"]


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is there"
)
def test_what_did_not_run_is_not_passed(rows: list[list[str]]) -> None:
    ((_, status, _, reason),) = [row for row in rows if row[0] == "fp8_loss"]
    assert status == "skipped" and "not installed" in reason
