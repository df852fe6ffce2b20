"""The branch study: its verdict, and steps that do not fit."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.functional_tests.launch import ROOT, environment, load_of_study, only_in_all

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STUDY = ROOT / "examples" / "branch_study" / "run.py"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load_of_study("branch_study", "run")


def start(out: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the command."""
    command = [sys.executable, str(STUDY), "--out", str(out), *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)


def test_the_verdict_follows_from_the_losses(module: ModuleType) -> None:
    rows = [(1, 4.0, 3.9, 3.8), (2, 4.0, 3.9, 3.95), (3, 4.0, 3.9, 3.7)]
    assert module.verdict(rows).endswith("for 2 of 3 seeds: by -0.050 to 0.200 nats per token.")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--steps", "30"), "--steps 30 is no multiple of 20"),
        (("--anneal-steps", "30"), "--anneal-steps 30 is no multiple of 20"),
        (("--steps", "40", "--anneal-steps", "40"), "--anneal-steps 40 is not below --steps 40"),
    ],
)
def test_steps_that_do_not_fit(flags: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = start(tmp_path / "out", *flags)
    assert done.returncode == 2 and words in done.stderr and "Remedy: " in done.stderr


@only_in_all
def test_a_short_study(data: Path, tmp_path: Path) -> None:
    flags = ("--seeds", "1", "--steps", "40", "--anneal-steps", "20", "--data", str(data))
    done = start(tmp_path / "out", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| seed | step 20 | step 40, at the plateau | the same, annealed |" in done.stdout
    assert (tmp_path / "out" / "branches.png").is_file()
