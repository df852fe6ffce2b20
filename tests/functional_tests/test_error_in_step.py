"""Who mends an error decides how it ends: a bug keeps its trace, a user reads one paragraph."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.alarm_receiver import TOKEN, receiving
from tests.functional_tests.launch import SMALL, environment, only_in_all
from trinity_megatron.process.alarms import VARIABLE

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# In its second step torch raises a ValueError, or this package a UserError.
SCRIPT = """
if __name__ == "__main__":
    from trinity_megatron.process.rank import enter_rank

    enter_rank()
import functools
import sys
import torch
from trinity_megatron.errors import UserError
from trinity_megatron.training import pretrain
from megatron.training import get_args, training

train_step = training.train_step
kind = sys.argv.pop(1)

@functools.wraps(train_step)
def fail(*args, **kwargs):
    if get_args().curr_iteration == 1 and kind == "torch":
        torch.distributions.Normal(torch.tensor(float("nan")), 1.0)
    if get_args().curr_iteration == 1:
        raise UserError("--flag 3 is wrong. Remedy: --flag 4.")
    return train_step(*args, **kwargs)

if __name__ == "__main__":
    training.train_step = fail
    pretrain.run()
"""


@pytest.mark.parametrize(("kind", "code"), [("torch", 1), ("user", 2)])
def test_an_error_in_a_step(kind: str, code: int, data: Path, tmp_path: Path) -> None:
    """What ends with a trace reaches a webhook; that of the other run does not answer."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    flags = [*SMALL, "--data", str(data), "--out", str(tmp_path / "run")]
    with receiving() as receiver:
        url = receiver.url if kind == "torch" else f"http://127.0.0.1:9/{TOKEN}"
        result = subprocess.run(
            [sys.executable, str(path), kind, *flags],
            env={**environment(), VARIABLE: url},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == code, result.stderr[-3000:]
    if kind == "torch":
        (alarm,) = receiver.alarms
        assert alarm["text"].startswith("run, step 2: the run ends: ValueError: Expected parameter")
        assert (alarm["kind"], alarm["rank"], alarm["step"]) == ("error", 0, 2)
    else:
        assert f"> {VARIABLE}: an alarm was not sent (Connection refused)" in result.stderr
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(b"hang_seconds" in content for content in written)  # the arguments
    output = (result.stdout + result.stderr).encode()
    assert not any(TOKEN.encode() in content for content in (*written, output))
    has_trace = "Traceback (most recent call last)" in result.stderr
    assert has_trace == (kind == "torch")
    words = "Expected parameter loc" if kind == "torch" else "error: --flag 3 is wrong. Remedy:"
    assert words in result.stderr


@pytest.mark.parametrize(
    ("mode", "code", "words"),
    [
        ("disabled", 2, "the gradient norm is nan. The latest checkpoint in "),
        pytest.param(
            "validate_results", 16, "--rerun-mode validate_results: Megatron", marks=only_in_all
        ),
    ],
)
def test_a_loss_that_diverges(mode: str, code: int, words: str, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", *SMALL, "--data", str(data)]
    command += ["--out", str(tmp_path / "run"), "--lr", "1e30", "--lr-warmup-fraction", "0"]
    command += ["--rerun-mode", mode]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr[-3000:]
    assert words in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
