"""Alarms to a webhook: what somebody who does not watch a run should know of it.

The address stands in an environment variable, for it often holds a token: a flag would be in the
arguments that a run prints, saves in its checkpoints and sends to W&B.  For the same reason no
message here shows it, nor what the libraries say of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from trinity_megatron.errors import UserError
from trinity_megatron.process.screen import tell

VARIABLE = "TRINITY_ALARM_WEBHOOK"
_TIMEOUT = 5.0  # seconds for an answer
_SECONDS_TO_CLOSE = 8.0  # for all that waits
_CAPACITY = 100


def read_webhook(environment: Mapping[str, str] | None = None) -> str | None:
    """The address of the webhook; None without one.

    Args:
        environment: Of this process, if None.

    Raises:
        UserError: It is no address of http or https; the message does not show it.
    """
    url = (os.environ if environment is None else environment).get(VARIABLE, "").strip()
    if not url:
        return None
    if not _is_address(url):
        raise UserError(
            f"{VARIABLE} is no address of http:// or https:// (it may hold a token, so it is not "
            "shown). Remedy: the address of an incoming webhook, such as "
            "https://hooks.slack.com/services/..., or unset it."
        )
    return url


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    is_plain = url.isascii() and url.isprintable() and " " not in url
    has_host = bool(parts.hostname) and parts.username is None
    return is_plain and has_host and parts.scheme in ("http", "https")


class Alarms:
    """Sends alarms from a thread of its own; without an address it does nothing.

    A training neither waits for it, but at its end some seconds at most, nor fails with it: what
    could not be sent is said once.

    Args:
        url: From :func:`read_webhook`.
        run: Name of the run.
        rank: Of this process; None for a supervisor.
        step: Returns the step that the run is in; None before the first.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        run: str = "",
        rank: int | None = None,
        step: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._url, self._run, self._rank, self._step = url, run, rank, step
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(_CAPACITY)
        self._thread: threading.Thread | None = None
        self._has_failed = False

    @property
    def is_on(self) -> bool:
        """Whether there is somebody to tell."""
        return self._url is not None

    def send(self, kind: str, text: str) -> None:
        """Send an alarm, in the background.

        Args:
            kind: A word or two, by which a receiver may choose.
            text: What has happened, for people.
        """
        if self._url is None:
            return
        step = self._step()
        where = ", ".join(filter(None, (self._run, None if step is None else f"step {step}")))
        content = {
            "run": self._run,
            "step": step,
            "host": socket.gethostname(),
            "rank": self._rank,
            "kind": kind,
            "text": f"{where}: {text}" if where else text,
            "time": round(time.time(), 3),
        }
        try:
            self._waiting.put_nowait(content)
        except queue.Full:
            self._say(f"more than {_CAPACITY} wait")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alarms", daemon=True)
            self._thread.start()

    def send_once(self, kind: str, text: str) -> None:
        """:meth:`send` on rank 0, where all ranks know."""
        if not self._rank:
            self.send(kind, text)

    def close(self) -> None:
        """Send what waits, in bounded time."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(_SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._say("the address does not answer")
        self._thread = None

    def _work(self) -> None:
        # Another address than the one that was given gets nothing: no redirection.
        opener = urllib.request.build_opener(_NoRedirection)
        while (content := self._waiting.get()) is not None:
            try:
                self._post(opener, content)
            except Exception as error:  # of a library, which may well name the address
                self._say(_describe(error))

    def _post(self, opener: urllib.request.OpenerDirector, content: Mapping[str, Any]) -> None:
        assert self._url is not None
        request = urllib.request.Request(
            self._url,
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "trinity-megatron"},
        )
        with opener.open(request, timeout=_TIMEOUT):
            pass

    def _say(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            with contextlib.suppress(OSError, ValueError):
                tell(f"> {VARIABLE}: an alarm was not sent ({reason})", is_error=True)


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _describe(error: Exception) -> str:
    """What went wrong, without what a library says of the address."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {_TIMEOUT:g} s"
    strerror = getattr(cause, "strerror", None)
    return strerror if isinstance(strerror, str) else type(cause).__name__
