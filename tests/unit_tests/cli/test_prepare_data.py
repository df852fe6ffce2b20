"""``trinity-megatron prepare-data``: its flags, what it prints and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trinity_megatron.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


def test_unknown_flag_of_prepare_data_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prepare-data", "--out", "D", "--vocab", "3"])
    assert "unrecognized arguments: --vocab 3" in capsys.readouterr().err


def test_prepare_data_makes_data_that_train_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trinity_megatron.launch.local import check_data

    source = tmp_path / "text"
    source.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * i) % 97} of line {i}" for i in range(100))
        (source / f"{number}.txt").write_text(words)
    out = tmp_path / "data"
    code = main(["prepare-data", "--out", str(out), "--source", str(source), "--vocab-size", "300"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert f"{out} train: " in printed.out and f"{out} validation: " in printed.out
    check_data(str(out))
    again, tokenizer = tmp_path / "again", out / "tokenizer"
    command = ["prepare-data", "--out", str(again), "--source", str(source)]
    assert main([*command, "--tokenizer", str(tokenizer)]) == 0
    assert (again / "train.bin").read_bytes() == (out / "train.bin").read_bytes()


def write_words(path: Path, count: int, separator: str, *, key: str | None = None) -> Path:
    texts = [
        " ".join(f"word{(number * i) % 97} of line {i}" for i in range(100))
        for number in range(1, count + 1)
    ]
    rows = [json.dumps({"meta": {key: text}}) if key else text for text in texts]
    path.write_text(separator.join(rows))
    return path


def test_prepare_data_is_quiet_and_says_which_presets_are_too_long(tmp_path: Path) -> None:
    source = write_words(tmp_path / "a.txt", 60, "\n\n\n")
    command = [sys.executable, "-m", "trinity_megatron.cli", "prepare-data"]
    command += ["--out", str(tmp_path / "out"), "--source", str(source)]
    command += ["--vocab-size", "300", "--split-on", r"\n\n\n"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Transformer Engine" not in result.stderr and "Warning" not in result.stderr
    assert "train: " in result.stdout
    numbers = re.findall(r"validation: (\d+) documents, ([\d,]+) tokens", result.stdout)
    assert (
        "validation has " + numbers[0][1] + " tokens: shorter than a sequence of" in result.stdout
    )
    assert "large (8192)" in result.stdout and "tiny" not in result.stdout


def test_prepare_data_takes_a_key_and_says_what_keys_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_words(tmp_path / "a.json", 60, "\n", key="body")
    command = ["prepare-data", "--out", str(tmp_path / "out"), "--source", str(source)]
    assert main([*command, "--vocab-size", "300"]) == 2
    err = capsys.readouterr().err
    assert "no field 'text', only meta.body" in err and "--text-key" in err
    assert main([*command, "--vocab-size", "300", "--text-key", "meta.body"]) == 0
    assert not list(tmp_path.glob("*building*"))


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (r"\n\n\n", "\n\n\n"),
        (r"a\tb\\n", "a\tb\\n"),
        ("<|endoftext|>", "<|endoftext|>"),
        ("\n--\n", "\n--\n"),
        (r"\s+", None),
        ("end\\", None),
    ],
)
def test_escapes_of_split_on(value: str, meaning: str | None) -> None:
    from trinity_megatron.cli.prepare_data import unescape

    if meaning is None:
        with pytest.raises(ValueError, match=r"--split-on .* is not understood"):
            unescape("--split-on", value)
    else:
        assert unescape("--split-on", value) == meaning


def test_a_given_tokenizer_has_its_own_vocabulary_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare-data", "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path)]
    assert main([*command, "--vocab-size", "4096"]) == 2
    err = capsys.readouterr().err
    assert "--vocab-size 4096 does not go with --tokenizer" in err and "leave out" in err
    assert list(tmp_path.iterdir()) == []
