"""Enough of a W&B server for wandb to start a run, send its rows, and continue it."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_RUN = {
    "id": "run",
    "displayName": "run",
    "description": None,
    "sweepName": None,
    "project": {"id": "project", "name": "p", "entity": {"id": "entity", "name": "e"}},
    "historyLineCount": 0,
}


class Server(ThreadingHTTPServer):
    """A server on a free port of this machine.

    Attributes:
        rows: The history rows that arrived.
        last_step: Of the run that a client wants to continue; None if there is no such run.
    """

    daemon_threads = True

    def __init__(self, last_step: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rows: list[dict[str, Any]] = []
        self.last_step = last_step

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["Server"]:
        """Answer until the end of the block."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.shutdown()
        self.server_close()

    def answer(self, operation: str, name: str) -> dict[str, Any]:
        """The data of a GraphQL operation on the run of this name."""
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": {**_RUN, "name": name}, "inserted": True}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "m", "name": "p", **self._known_run(name)}}
        return {}

    def _known_run(self, name: str) -> dict[str, Any]:
        entity = {"entity": {"id": "entity", "name": "e"}}
        if self.last_step is None:
            return {**entity, "bucket": None}
        tail = json.dumps([json.dumps({"_step": self.last_step, "_runtime": 1})])
        counts = {"historyLineCount": self.last_step, "eventsLineCount": 0, "logLineCount": 0}
        known = {**_RUN, "name": name, "historyTail": tail, "eventsTail": "[]", "config": "{}"}
        known |= {"summaryMetrics": "{}", "tags": [], "notes": "", "wandbConfig": '{"t": 1}'}
        return {**entity, "bucket": {**known, **counts}}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if "graphql" in self.path:
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            name = (request.get("variables") or {}).get("name") or "run"
            answer = {"data": self.server.answer(operation.group(1) if operation else "", name)}
        elif "file_stream" in self.path:
            files = json.loads(body).get("files") or {}
            lines = files.get("wandb-history.jsonl", {}).get("content", [])
            self.server.rows += [json.loads(line) for line in lines]
            answer = {"exitcode": None, "limits": {}}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
