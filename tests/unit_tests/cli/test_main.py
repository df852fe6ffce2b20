"""The command line: what reaches Megatron, and what a user sees when the input is at fault."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trinity_megatron import __version__
from trinity_megatron.cli.main import build_parser, main

ROOT = Path(__file__).resolve().parents[3]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from trinity_megatron.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print('HEAVY', *({'torch', 'numpy', 'megatron'} & set(sys.modules)))\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: trinity-megatron")
    assert result.stdout.splitlines()[-1] == "HEAVY"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"trinity-megatron {__version__}\n"


def test_flags_of_megatron_pass_through_in_order() -> None:
    # --data-parallel-random-init and --nproc... must not be taken for abbreviations of ours.
    flags = ["--lr", "1e-3", "--data-parallel-random-init", "--window-size", "-1", "--out-of=x"]
    args, others = build_parser().parse_known_args(
        ["train", *flags[:3], "--data", "D", *flags[3:], "--out", "O", "--nproc", "2"]
    )
    assert others == flags
    assert (args.preset, args.data, args.out, args.nproc) == ("tiny", "D", "O", 2)


def test_unknown_flag_of_prepare_data_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prepare-data", "--out", "D", "--vocab", "3"])
    assert "unrecognized arguments: --vocab 3" in capsys.readouterr().err


def test_error_is_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert main(["train", "--data", str(missing), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trinity-megatron: error: ")
    assert err.count("\n") == 1
    assert str(missing) in err and "prepare-data" in err


def test_error_has_its_trace_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRINITY_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", "--data", str(tmp_path / "missing"), "--out", str(tmp_path / "out")])


def test_nothing_is_written_before_the_input_is_checked(tmp_path: Path) -> None:
    assert main(["train", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []


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
    result = run_python(
        "-m", "trinity_megatron.cli", "prepare-data", "--out", str(tmp_path / "out"),
        "--source", str(source), "--vocab-size", "300", "--split-on", r"\n\n\n",
    )  # fmt: skip
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
    from trinity_megatron.cli.main import _unescape

    if meaning is None:
        with pytest.raises(ValueError, match=r"--split-on .* is not understood"):
            _unescape("--split-on", value)
    else:
        assert _unescape("--split-on", value) == meaning


def test_a_given_tokenizer_has_its_own_vocabulary_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare-data", "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path)]
    assert main([*command, "--vocab-size", "4096"]) == 2
    err = capsys.readouterr().err
    assert "--vocab-size 4096 does not go with --tokenizer" in err and "leave out" in err
    assert list(tmp_path.iterdir()) == []


def test_report_without_event_files_is_the_users_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("trinity-megatron: error: ") and err.count("\n") == 1
    assert str(tmp_path / "no") in err and "Remedy" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["tensorboard", "."])
def test_report_says_where_the_page_is(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "run" / folder) as writer:
        for step in range(3):
            writer.add_scalar("lm loss", 2.0, step)
    assert main(["report", str(tmp_path / "run")]) == 0
    page = tmp_path / "run" / "report" / "report.html"
    assert capsys.readouterr().out == f"{page} and 1 picture\n"
    assert "<title>run</title>" in page.read_text(encoding="utf-8")
    out = tmp_path / "elsewhere"
    assert main(["report", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "report.html"]
