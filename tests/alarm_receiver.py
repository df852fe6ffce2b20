"""A web server that takes alarms."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# As in the addresses of webhooks; it must not be seen anywhere.
TOKEN = "T0123-secret-token"


@dataclass
class Receiver:
    """What has come to an address.

    Attributes:
        url: The address.
        alarms: The content of each request, parsed.
    """

    url: str = ""
    alarms: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def receiving(status: int = 200, wait: Callable[[], object] = lambda: None) -> Iterator[Receiver]:
    """Serve an address on this machine.

    Args:
        status: Of the answers; a redirection leads to the same server.
        wait: Called before each answer.
    """
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            wait()
            receiver.alarms.append(content)
            self._answer()

        def do_GET(self) -> None:  # what a library makes of a redirected POST
            receiver.alarms.append({"kind": "GET"})
            self._answer()

        def _answer(self) -> None:
            self.send_response(status)
            self.send_header("Location", receiver.url + "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing on the screen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}/services/{TOKEN}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
