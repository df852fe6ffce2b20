"""The command line: what reaches Megatron, and what a user sees when the input is at fault."""

import os
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
