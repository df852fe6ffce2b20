"""A trained model in block FP8: its loss on the validation split."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.launch import SMALL, environment, only_in_all
from trinity_megatron.cli.main import main

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@only_in_all
def test_loss_in_fp8(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--nproc", "1", *SMALL]
    flags = ["--data", str(data), "--out", str(tmp_path / "run"), "--train-iters", "50"]
    ended = subprocess.run(
        [*command, *flags], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    export = ["export", "--load", str(tmp_path / "run" / "checkpoints"), "--format", "fp8-block"]
    verify = ["--verify", "--data", str(data), "--seq-length", "64"]
    limit = ["--max-loss-difference", "0.02"]
    assert main([*export, "--out", str(tmp_path / "fp8"), *verify, *limit]) == 0
    found = re.search(r"loss ([\d.]+) against ([\d.]+) nats", capsys.readouterr().out)
    assert found is not None
    loss, reference = map(float, found.groups())
    # Trained: below the entropy of the frequencies of the tokens, ln 512 = 6.2 at most.
    assert reference < 5.2 and loss != reference and abs(loss - reference) < 0.02
