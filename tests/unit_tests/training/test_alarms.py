"""The end of a run with an error is an alarm, once for all of its ranks."""

from argparse import Namespace
from pathlib import Path

import pytest

from tests.alarm_receiver import Receiver, receiving
from trinity_megatron.errors import UserError
from trinity_megatron.process.alarms import VARIABLE
from trinity_megatron.training.alarms import alarms_of


def end(
    out: Path | None, error: BaseException | None, monkeypatch: pytest.MonkeyPatch, *ranks: int
) -> Receiver:
    """What comes of an error that all of the ranks meet, one after the other."""
    out_name = None if out is None else str(out)
    with receiving() as receiver:
        monkeypatch.setenv(VARIABLE, receiver.url)
        for rank in ranks:
            args = Namespace(out=out_name, rank=rank, wandb_exp_name="", curr_iteration=6)
            try:
                with alarms_of(args):
                    if error is not None:
                        raise error
            except BaseException as seen:
                assert seen is error
    return receiver


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "nano" / "logs").mkdir(parents=True)
    return tmp_path / "nano"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("--lr -1. Remedy: 1."), "nano, step 7: the run ends: --lr -1. Remedy: 1."),
        (ValueError("a\nb"), "nano, step 7: the run ends: ValueError: a"),
        (MemoryError(), "nano, step 7: the run ends: MemoryError"),
        (SystemExit(3), "nano, step 7: the run ends with exit code 3"),
    ],
)
def test_the_first_rank_says_it(
    error: BaseException, text: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (alarm,) = end(out, error, monkeypatch, 2, 1, 3).alarms
    assert (alarm["text"], alarm["kind"]) == (text, "error")
    assert (alarm["rank"], alarm["run"], alarm["step"]) == (2, "nano", 7)
    # The next start, which rank 0 begins, is told of again.
    assert [alarm["rank"] for alarm in end(out, error, monkeypatch, 0, 1).alarms] == [0]


def test_without_a_folder_rank_0_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = end(None, ValueError("a"), monkeypatch, 2, 0, 1)
    assert [alarm["rank"] for alarm in found.alarms] == [0]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), SystemExit(0), SystemExit()])
def test_an_end_that_was_asked_for(
    error: BaseException | None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert end(out, error, monkeypatch, 0).alarms == []


def test_what_is_no_address_ends_the_run_before_it_begins(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "nowhere")
    with pytest.raises(UserError, match=VARIABLE):
        with alarms_of(Namespace(out=str(out), rank=0, wandb_exp_name="")):
            raise AssertionError
