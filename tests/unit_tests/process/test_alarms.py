"""Alarms come to a webhook, keep its address to themselves, and hold nothing up."""

import socket
import threading
import time

import pytest

from tests.alarm_receiver import TOKEN, receiving
from trinity_megatron.errors import UserError
from trinity_megatron.process.alarms import VARIABLE, Alarms, read_webhook


def test_what_an_alarm_says() -> None:
    before = time.time()
    with receiving() as receiver:
        alarms = Alarms(receiver.url, run="nano-3", rank=5, step=lambda: 17)
        alarms.send("spike", "step 17 is skipped: the loss is 9.1")
        alarms.send_once("spike", "rank 0 says it")
        alarms.close()
    (alarm,) = receiver.alarms
    assert before - 1 <= alarm.pop("time") <= time.time() + 1
    assert alarm == {
        "run": "nano-3",
        "step": 17,
        "host": socket.gethostname(),
        "rank": 5,
        "kind": "spike",
        "text": "nano-3, step 17: step 17 is skipped: the loss is 9.1",
    }


def test_it_is_sent_in_the_background() -> None:
    may_answer = threading.Event()
    with receiving(wait=may_answer.wait) as receiver:
        alarms = Alarms(receiver.url)
        for number in range(3):
            alarms.send_once("hang", str(number))
        assert not receiver.alarms  # send() would not have come back
        may_answer.set()
        alarms.close()
    assert [alarm["text"] for alarm in receiver.alarms] == ["0", "1", "2"]


@pytest.mark.parametrize("status", [404, 500, 302])
def test_a_server_that_refuses(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with receiving(status) as receiver:
        alarms = Alarms(receiver.url)
        alarms.send("error", "one")
        alarms.send("error", "two")
        alarms.close()
    assert [alarm["kind"] for alarm in receiver.alarms] == ["error"] * 2  # no GET elsewhere
    said = capsys.readouterr().err
    assert said == f"> {VARIABLE}: an alarm was not sent (HTTP status {status})\n"


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, but it takes no connections
        taken.bind(("127.0.0.1", 0))
        alarms = Alarms(f"http://127.0.0.1:{taken.getsockname()[1]}/{TOKEN}")
        alarms.send("error", "one")
        alarms.close()
    said = capsys.readouterr().err
    assert said == f"> {VARIABLE}: an alarm was not sent (Connection refused)\n"


def test_what_waits_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    may_answer = threading.Event()
    with receiving(wait=may_answer.wait) as receiver:
        alarms = Alarms(receiver.url)
        for number in range(200):
            alarms.send("spike", str(number))
        may_answer.set()
        alarms.close()
    assert "an alarm was not sent (more than 100 wait)" in capsys.readouterr().err
    assert 100 <= len(receiver.alarms) <= 102


def test_without_an_address() -> None:
    assert read_webhook({}) is None and read_webhook({VARIABLE: " "}) is None
    alarms = Alarms()
    assert not alarms.is_on
    alarms.send("error", "nobody is told")
    alarms.close()


@pytest.mark.parametrize(
    "url",
    [
        f"hooks.slack.com/{TOKEN}",
        f"ftp://host/{TOKEN}",
        f"file:///{TOKEN}",
        f"https:///{TOKEN}",
        f"https://host:port/{TOKEN}",
        f"https://[host/{TOKEN}",
        f"https://user:{TOKEN}@host/x",
        f"https://host/a b{TOKEN}",
        f"https://host/\n{TOKEN}",
    ],
)
def test_what_is_no_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError, match=f"{VARIABLE} is no address of http.*Remedy: ") as error:
        read_webhook({VARIABLE: url})
    assert TOKEN not in str(error.value)
