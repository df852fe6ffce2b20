"""What a wrong flag and a refusal of Megatron's become: one sentence with a remedy."""

import argparse
from pathlib import Path

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.training.arguments.parser_errors import (
    friendly_parser_errors,
    megatron_refusals,
)

CHOICES = {"red": 1, "blue": 2}


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """A parser with flags as Megatron declares some."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    made.add_argument("--train-iters", type=int, help="a bare % would end --help")
    made.add_argument("--colour", type=lambda text: CHOICES[text])
    friendly_parser_errors(made)
    return made


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train-itres", "3"], ("--train-itres", "did you mean --train-iters")),
        (["--xyz"], ("--xyz", "--help lists all flags")),
        (["--train-iters", "many"], ("--train-iters", "'many'", "give another value")),
        (["--colour", "green"], ("--colour", "'green'", "give another value")),
    ],
)
def test_a_wrong_flag(
    flags: list[str], words: tuple[str, ...], parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(UserError) as error:
        parser.parse_args(flags)
    assert all(word in str(error.value) for word in (*words, "Remedy: "))


def test_help_with_a_bare_percent_sign(parser: argparse.ArgumentParser) -> None:
    assert "a bare % would" in parser.format_help()


def import_check(folder: Path, text: str) -> dict[str, object]:
    """A check that lies in a folder of this name, where Megatron's checks are looked for."""
    folder.mkdir()
    path = folder / "checks.py"
    path.write_text(text)
    names: dict[str, object] = {}
    exec(compile(text, str(path), "exec"), names)
    return names


def test_a_bare_assertion_of_megatron_names_the_flags(tmp_path: Path) -> None:
    text = "def check(args):\n    assert args.hidden_size % (\n        args.kv_channels) == 0\n"
    check = import_check(tmp_path / "megatron", text)["check"]
    args = argparse.Namespace(hidden_size=3, kv_channels=2)
    expected = "Megatron refuses the arguments: .*Remedy: see --hidden-size, --kv-channels"
    with pytest.raises(UserError, match=expected), megatron_refusals():
        check(args)  # type: ignore[operator]
    with pytest.raises(AssertionError), megatron_refusals(has_begun=lambda: True):
        check(args)  # type: ignore[operator]


def test_a_message_of_megatron_is_kept(tmp_path: Path) -> None:
    text = "def check():\n    raise ValueError('layers and\\n stages differ.')\n"
    check = import_check(tmp_path / "megatron", text)["check"]
    expected = "refuses the arguments: layers and stages differ. Remedy: change what it names"
    with pytest.raises(UserError, match=expected), megatron_refusals():
        check()  # type: ignore[operator]


def test_errors_from_elsewhere_keep_their_trace(tmp_path: Path) -> None:
    text = "def check():\n    raise ValueError('a bug')\n"
    check = import_check(tmp_path / "elsewhere", text)["check"]
    with pytest.raises(ValueError, match="a bug") as error, megatron_refusals():
        check()  # type: ignore[operator]
    assert not isinstance(error.value, UserError)
    with pytest.raises(UserError, match="ours"), megatron_refusals():
        raise UserError("ours")
