"""What upstream prints goes to a file; our lines, warnings and traces reach the screen."""

import logging
import sys
from pathlib import Path

import pytest

from trinity_megatron.process.screen import tell, tell_once, upstream_output_in

Screen = pytest.CaptureFixture[str]


def test_each_line_goes_where_it_belongs(
    capsys: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = logging.StreamHandler(sys.stdout)  # as Megatron installs one
    monkeypatch.setattr(logging.root, "handlers", [handler])
    log = tmp_path / "logs" / "rank_00000.log"
    with upstream_output_in(log):
        print("Megatron prints")
        print("Megatron complains", file=sys.stderr)
        logging.getLogger("some.library").error("Megatron logs")
        logging.getLogger("trinity_megatron.training").warning("we log")
        tell("we tell")
        tell("an error", is_error=True)
    assert capsys.readouterr() == ("we tell\n", "we log\nan error\n")
    text = log.read_text()
    for line in ("Megatron prints", "Megatron complains", "Megatron logs"):
        assert line in text
    logging.getLogger("some.library").error("afterwards")
    print("afterwards, too")
    assert capsys.readouterr().out == "afterwards\nafterwards, too\n"
    assert logging.getLogger("trinity_megatron").propagate


def test_an_error_leaves_the_block(capsys: Screen, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), upstream_output_in(tmp_path / "log"):
        raise ZeroDivisionError
    print("on the screen again")
    assert capsys.readouterr().out == "on the screen again\n"


def test_a_log_that_cannot_be_opened(capsys: Screen, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with upstream_output_in(tmp_path / "file" / "log"):
        print("Megatron prints")
    said, line, _ = capsys.readouterr().out.split("\n")
    assert str(tmp_path / "file" / "log") in said and line == "Megatron prints"


def test_a_later_start_appends(capsys: Screen, tmp_path: Path) -> None:
    for word in ("first", "second"):
        with upstream_output_in(tmp_path / "log"):
            print(word)
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


@pytest.mark.parametrize(("rank", "expected"), [("0", "once\n"), ("1", ""), (None, "once\n")])
def test_rank_0_alone_tells_once(
    rank: str | None,
    expected: str,
    capsys: Screen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    tell_once("once")
    assert capsys.readouterr().out == expected
