"""A client of ``/chat/completions`` as OpenAI's, vLLM's, SGLang's and llama.cpp's servers have it.

Source: https://platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from trinity_megatron.errors import UserError

logger = logging.getLogger(__name__)
# What passes by itself: timeouts, conflicts, too many requests, and all of the server's errors.
_PASSING = (408, 409, 425, 429)
# The request is wrong for every document.
_FATAL = {
    401: "the API key: --api-key-variable",
    403: "the API key: --api-key-variable",
    404: "--base-url (it ends in /v1 as a rule) and --model",
    405: "--base-url (it ends in /v1 as a rule)",
}
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_SHOWN_CHARACTERS = 300


class RefusedDocumentError(ValueError):
    """The server has no usable answer for this document."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        model: Name for the server.
        max_tokens: Of an answer.
        temperature: None for the server's.
    """

    model: str
    max_tokens: int
    temperature: float | None = None


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: Its text, not empty.
        model: As the server names it.
        prompt_tokens: As the server counts, None where it does not.
        completion_tokens: The same of the answer.
    """

    text: str
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class ChatClient:
    """Asks a server, again and again where a failure passes by itself.

    Args:
        base_url: For example ``http://localhost:8000/v1``.
        sampling: Of all answers.
        api_key: Sent as a bearer token; None for none.  It is in no message and no file.
        connections: Largest number of requests at a time.
        timeout: Seconds to wait for an answer.
        attempts: Of a request, before the server counts as down.

    Raises:
        UserError: The address is none, or httpx is not installed.
    """

    def __init__(
        self,
        base_url: str,
        sampling: Sampling,
        *,
        api_key: str | None = None,
        connections: int = 16,
        timeout: float = 600.0,
        attempts: int = 8,
    ) -> None:
        self._httpx = _import_httpx()
        self._url = check_base_url(base_url) + "/chat/completions"
        self._sampling, self._key, self._attempts = sampling, api_key, attempts
        self._client = self._httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=self._httpx.Limits(max_connections=connections),
            timeout=self._httpx.Timeout(timeout, connect=10.0),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(self, prompt: str, *, seed: int) -> Answer:
        """The answer to a prompt.

        Args:
            prompt: Sent as the message of the user.
            seed: For servers that draw by it.

        Raises:
            RefusedDocumentError: The server refuses the document, or its answer is empty or cut.
            UserError: It refuses the model or the key, or does not answer after all attempts.
        """
        sampling = self._sampling
        body: dict[str, Any] = {
            "model": sampling.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": sampling.max_tokens,
            "seed": seed,
        }
        if sampling.temperature is not None:
            body["temperature"] = sampling.temperature
        response = await self._send(body)
        if response.status_code in _FATAL or not response.is_success | response.is_client_error:
            look = _FATAL.get(response.status_code, "--base-url")
            raise UserError(
                f"{self._url} answers {response.status_code}: {self._shown(response.text)}. "
                f"Remedy: look at {look}; what is rewritten is kept."
            )
        if response.status_code >= 400:
            raise RefusedDocumentError(
                f"the server answers {response.status_code}: {self._shown(response.text)}"
            )
        return self._read(response)

    async def _send(self, body: dict[str, Any]) -> Any:
        """The first response that is no passing failure."""
        problem = ""
        for attempt in range(1, self._attempts + 1):
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                response = await self._client.post(self._url, json=body)
            except (self._httpx.TransportError, self._httpx.DecodingError) as error:
                problem = f"{type(error).__name__} {self._shown(str(error))}".strip()
            else:
                if response.status_code not in _PASSING and response.status_code < 500:
                    return response
                problem = f"{response.status_code} {self._shown(response.text)}".strip()
                wait = max(wait, _read_wait(response.headers.get("retry-after")))
            if attempt < self._attempts:
                logger.debug("attempt %d: %s; again in %.1f s", attempt, problem, wait)
                # Jitter: the other requests have failed at the same moment.
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
        raise UserError(
            f"{self._url} has failed {self._attempts} times in a row: {problem}. Remedy: look at "
            "the server and --base-url, and run the same command again; what is rewritten is kept."
        )

    def _read(self, response: Any) -> Answer:
        try:
            content = response.json()
            choice = content["choices"][0]
            text, end = choice["message"]["content"], choice.get("finish_reason")
            usage = content.get("usage") or {}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._url} does not answer as /v1/chat/completions does: "
                f"{self._shown(response.text)}. Remedy: look at --base-url."
            ) from error
        if end == "length":
            raise RefusedDocumentError(
                f"the answer is cut off after --max-tokens {self._sampling.max_tokens}"
            )
        if end == "content_filter":
            raise RefusedDocumentError("the server's content filter stopped the answer")
        if not isinstance(text, str) or not text.strip():
            raise RefusedDocumentError(f"the answer is empty (finish_reason {end!r})")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RefusedDocumentError("the answer is no valid Unicode (half of a surrogate pair)")
        model = content.get("model")
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        return Answer(text, model, *counts)

    def _shown(self, text: str) -> str:
        """The beginning of what the server says, in one line, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_SHOWN_CHARACTERS]


def check_base_url(base_url: str) -> str:
    """The address without a slash at its end.

    Raises:
        UserError: It is not an address of a server, or has a password in it.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--base-url {base_url!r} is no address. Remedy: for example http://localhost:8000/v1."
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"--base-url of {parts.hostname} has a user, password or query in it, which logs would "
            "show. Remedy: the key in an environment variable, and --api-key-variable NAME."
        )
    return base_url.rstrip("/")


def _read_wait(value: str | None) -> float:
    """Seconds of a ``Retry-After``; 0 for none, or for a date."""
    try:
        return min(_LONGEST_WAIT_S, max(0.0, float(value or 0)))
    except ValueError:
        return 0.0


def _import_httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise UserError(
            "data rewrite needs the package httpx, which is not installed. Remedy: "
            "pip install 'trinity_megatron[rewrite]'"
        ) from error
    return httpx
