"""Rewriting all documents of some files: many requests at a time, a shard for each file."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trinity_megatron.data.corpus import (
    Document,
    ReadOptions,
    Skipped,
    SourceFile,
    find_files,
    is_unchanged,
    read_documents,
)
from trinity_megatron.data.left_out import LeftOut, check_formats
from trinity_megatron.data.rewrite.chat_client import Answer, ChatClient, RefusedDocumentError
from trinity_megatron.data.rewrite.prompts import Prompt, draw
from trinity_megatron.data.rewrite.settings import RewriteSettings, keep_settings
from trinity_megatron.data.rewrite.shard import RewrittenShard
from trinity_megatron.errors import UserError

logger = logging.getLogger(__name__)
DOCUMENTS_NAME, FAILED_NAME, JOURNALS_NAME = "documents", "failed", "unfinished"
_SECONDS_BETWEEN_REPORTS = 30.0
_MAX_LEFT_OUT = 0.1  # as prepare-data


@dataclass
class Totals:
    """What a command has done.

    Attributes:
        documents: In the complete shards, also of earlier commands.
        asked: Rewritten by this command.
        failed: Documents without an answer.
        tokens: Of the answers to this command, as the server counts them.
    """

    documents: int = 0
    asked: int = 0
    failed: int = 0
    tokens: int = 0


@dataclass
class _Source:
    """A source file that is being rewritten, and the documents that wait for their answers."""

    file: SourceFile
    shard: RewrittenShard
    num_waiting: int = 0
    is_read: bool = False


@dataclass(frozen=True)
class _Request:
    source: _Source
    number: int
    document: Document


def rewrite(
    out: Path,
    inputs: Sequence[Path],
    settings: RewriteSettings,
    client: ChatClient,
    *,
    concurrency: int,
    max_failed: int,
) -> Totals:
    """Rewrite all documents of some files, or go on with it.

    ``out/documents`` has a JSONL file for each source file, which appears when it is complete.

    Args:
        out: Folder to write.
        inputs: Files and folders, see :func:`find_files`.
        settings: What decides the documents.
        client: Asks the server.  It is closed at the end.
        concurrency: Documents that wait for an answer at a time.
        max_failed: Documents that may have none.

    Raises:
        UserError: An input, the folder or the server is at fault, or more documents fail.
    """
    options = ReadOptions(text_key=settings.text_key)
    files, skipped = find_files(inputs, exclude=out, options=options)
    check_formats(skipped, files, _MAX_LEFT_OUT)
    shards = _make_shards(out, files)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            keep_settings(out, settings.to_json(files))
            work = _Rewriting(files, shards, settings, client, options, max_failed)
            for entry in skipped:
                work.left_out.add(entry)
            asyncio.run(work.run(concurrency))
    except Timeout:
        raise UserError(f"another process rewrites in --out {out}. Remedy: wait for it.") from None
    work.left_out.report()
    return work.totals


class _Rewriting:
    """The work on all source files, which one event loop does."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        shards: Sequence[RewrittenShard],
        settings: RewriteSettings,
        client: ChatClient,
        options: ReadOptions,
        max_failed: int,
    ) -> None:
        self.files, self.shards, self.settings = files, shards, settings
        self.client, self.options, self.max_failed = client, options, max_failed
        self.totals, self.left_out = Totals(), LeftOut()
        self._start = self._last_report = time.monotonic()

    async def run(self, concurrency: int) -> None:
        """Ask for every document; what is in the journals at an error stays there."""
        requests = self._requests()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._ask_in_turn(requests))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            requests.close()
            for shard in self.shards:
                shard.close()
            await self.client.close()

    def _requests(self) -> Generator[_Request]:
        """The documents without an answer; the files are read as they are needed."""
        for file, shard in zip(self.files, self.shards, strict=True):
            if shard.is_complete:
                self.totals.documents += _count_lines(shard.path)
                self.totals.failed += _count_lines(shard.failures)
                continue
            source = _Source(file, shard)
            shard.open()
            for number, document in enumerate(self._documents(file)):
                if not shard.has(number):
                    source.num_waiting += 1
                    yield _Request(source, number, document)
            source.is_read = True
            self._finish_if_complete(source)

    def _documents(self, file: SourceFile) -> Iterator[Document]:
        for entry in read_documents([file], self.options):
            if isinstance(entry, Skipped):
                self.left_out.add(entry)
            else:
                yield entry

    async def _ask_in_turn(self, requests: Iterator[_Request]) -> None:
        for request in requests:
            prompt, seed = self._draw(request.document)
            shard = request.source.shard
            try:
                answer = await self.client.ask(prompt.fill(request.document.text), seed=seed)
            except RefusedDocumentError as error:
                self._note_failure(request, prompt, str(error))
            else:
                shard.add(request.number, self._record(request.document, prompt, seed, answer))
                self.totals.asked += 1
                self.totals.tokens += answer.completion_tokens or 0
            request.source.num_waiting -= 1
            self._finish_if_complete(request.source)
            self._report()

    def _draw(self, document: Document) -> tuple[Prompt, int]:
        prompts = self.settings.prompts
        number, seed = draw(self.settings.seed, document.name, len(prompts))
        return prompts[number], seed

    def _record(
        self, document: Document, prompt: Prompt, seed: int, answer: Answer
    ) -> dict[str, Any]:
        return {
            "text": answer.text,
            **_origin(document, prompt),
            "model": self.settings.model,
            "served_model": answer.model,
            "seed": seed,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }

    def _note_failure(self, request: _Request, prompt: Prompt, problem: str) -> None:
        self.totals.failed += 1
        document = request.document
        if self.totals.failed > self.max_failed:
            raise UserError(
                f"{document.name}: {problem}. Remedy: another --max-tokens or prompt, or leave "
                f"such documents out with --max-failed {self.totals.failed} or more; what is "
                "rewritten is kept."
            )
        record = {**_origin(document, prompt), "problem": problem}
        request.source.shard.add_failure(request.number, record)

    def _finish_if_complete(self, source: _Source) -> None:
        if not source.is_read or source.num_waiting:
            return
        if not is_unchanged(source.file):
            raise UserError(
                f"--input {source.file.path} changed while it was rewritten. Remedy: another --out."
            )
        self.totals.documents += source.shard.finish()

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._last_report < _SECONDS_BETWEEN_REPORTS:
            return
        self._last_report = now
        logger.info(
            "%d documents rewritten, %d failed; %.1f documents/s, %.0f tokens/s",
            self.totals.asked,
            self.totals.failed,
            self.totals.asked / (now - self._start),
            self.totals.tokens / (now - self._start),
        )


def _make_shards(out: Path, files: Sequence[SourceFile]) -> list[RewrittenShard]:
    """A shard for each source file, of its name.

    Raises:
        UserError: Two files would have the same.
    """
    names: dict[str, SourceFile] = {}
    shards = []
    for file in files:
        name = file.name if file.name.endswith(".jsonl") else f"{file.name}.jsonl"
        if name in names:
            raise UserError(
                f"--input {file.path} and {names[name].path} would both be {name}. Remedy: rename "
                "one, or rewrite it to another --out."
            )
        names[name] = file
        journals = (out / JOURNALS_NAME / name).parent
        shards.append(
            RewrittenShard(out / DOCUMENTS_NAME / name, journals, out / FAILED_NAME / name)
        )
    return shards


def _origin(document: Document, prompt: Prompt) -> dict[str, str]:
    """What a rewritten document is made of."""
    return {
        "source": document.name,
        "source_sha256": hashlib.sha256(document.text.encode("utf-8")).hexdigest(),
        "prompt": prompt.name,
        "prompt_sha256": prompt.digest,
    }


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _first(errors: BaseExceptionGroup) -> BaseException:
    """The first error of a group of groups; the other tasks were cancelled for it."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
