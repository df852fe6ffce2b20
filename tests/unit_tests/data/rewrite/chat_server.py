"""A server of ``/v1/chat/completions`` on this machine, which fails as it is told."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, SERVED_MODEL = "tiny-chat", "tiny-chat-2026"

# What is answered to a prompt at its n-th attempt: status, body, headers; None for a good answer.
Failure = Callable[[str, int], tuple[int, Any, dict[str, str]] | None]


@dataclass
class ChatServer:
    """What the server is told, and what it saw."""

    url: str
    fail: Failure
    key: str | None
    seconds: float
    asked: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_a_time: int = 0
    most_at_a_time: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def answer_to(prompt: str, seed: int) -> str:
    """A good answer: it depends on prompt and seed alone."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:8]
    return f"Rewritten {digest}: {prompt[::-1]}"


def completion(text: str | None, *, end: str = "stop") -> dict[str, Any]:
    """The body of a response."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": SERVED_MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": end}],
        "usage": {"prompt_tokens": 7, "completion_tokens": len((text or "").split())},
    }


@contextmanager
def serve(
    fail: Failure = lambda prompt, attempt: None, *, key: str | None = None, seconds: float = 0.0
) -> Iterator[ChatServer]:
    """Serve until the block ends.

    Args:
        fail: Decides which requests fail.
        key: That requests must have.
        seconds: That an answer takes.
    """
    server = ChatServer("", fail, key, seconds)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.at_a_time += 1
                server.most_at_a_time = max(server.most_at_a_time, server.at_a_time)
            time.sleep(server.seconds)
            status, content, headers = self.answer(body)
            with server.lock:
                server.at_a_time -= 1
            encoded = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(encoded))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(encoded)

        def answer(self, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
            if self.path != "/v1/chat/completions":
                return 404, {"error": {"message": f"no {self.path} here"}}, {}
            given = self.headers.get("Authorization")
            if server.key is not None and given != f"Bearer {server.key}":
                return 401, {"error": {"message": f"wrong key: {given}"}}, {}
            if body["model"] != MODEL:
                return 404, {"error": {"message": f"no model {body['model']}"}}, {}
            [message] = body["messages"]
            prompt = message["content"]
            with server.lock:
                server.bodies.append(body)
                server.asked[prompt] += 1
                attempt = server.asked[prompt]
            failure = server.fail(prompt, attempt)
            return failure or (200, completion(answer_to(prompt, body["seed"])), {})

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
