"""``trinity-megatron export``: contradicting flags, and a verified export from end to end."""

import json
from pathlib import Path

import pytest

from tests.unit_tests.export.export_cases import make_run, tokens
from trinity_megatron.cli.main import main


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--format bf16 --gguf-type F32", "--gguf-type belongs to --format gguf"),
        ("--format gguf --max-shard-size 1GB", "does not go with --format gguf"),
        ("--verify", "--verify needs text"),
        ("--verify --data d --tokens t", "--verify needs text"),
        ("--tokens t", "--tokens belongs to --verify"),
        ("--max-loss-difference 1", "--max-loss-difference belongs to --verify"),
        ("--verify --data d --seq-length 1", "--seq-length 1 is for --data, and at least 2"),
        ("--verify --tokens d --seq-length 9", "--seq-length 9 is for --data"),
        ("", "holds no Megatron checkpoint"),
    ],
)
def test_flags(flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = str(tmp_path / "none")
    command = ["export", "--load", there, "--out", str(tmp_path / "out"), *flags.split()]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = make_run(tmp_path), tmp_path / "tokens.json"
    file.write_text(json.dumps(tokens().tolist()))
    common = ["export", "--load", str(run), "--verify", "--tokens", str(file)]
    assert main([*common, "--out", str(tmp_path / "bf16")]) == 0
    assert "+0.000000 over 118 tokens" in capsys.readouterr().out
    fp8 = [*common, "--format", "fp8-block", "--max-loss-difference"]
    assert main([*fp8, "0.05", "--out", str(tmp_path / "fp8")]) == 0
    out = capsys.readouterr().out
    assert "fp8-block: loss " in out and "0.000000 over" not in out
    assert main([*fp8, "-1", "--out", str(tmp_path / "again")]) == 1
    assert "WORSE by more than -1 nats" in capsys.readouterr().out


def test_tokens_beyond_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = make_run(tmp_path), tmp_path / "tokens.json"
    file.write_text("[[5, 303]]")
    command = ["export", "--load", str(run), "--out", str(tmp_path / "out"), "--verify"]
    assert main([*command, "--tokens", str(file)]) == 2
    assert "ids must be within 0..302" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
