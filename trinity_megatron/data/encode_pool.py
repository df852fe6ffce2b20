"""Encoding batches of documents: in this process, or in several, with the same tokens."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tokenizers import Tokenizer

from trinity_megatron.data.tokenizer import encode_documents
from trinity_megatron.errors import UserError

# A batch for each process, and one that waits for it.
_BATCHES_PER_WORKER = 2
# Read by the tokenizers library at every call.
_THREADS_VARIABLE = "TOKENIZERS_PARALLELISM"

# Tokens of some documents: all of them one after the other, and the length of each.
Encoded = tuple[np.ndarray, np.ndarray]


class BatchEncoder:
    """Encodes documents with an end-of-text token after each.

    Args:
        tokenizer: The tokenizer.
        eos_token: Its end of text.
        dtype: Of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token: str, dtype: type[np.number]) -> None:
        self._tokenizer, self._eos_token, self._dtype = tokenizer, eos_token, dtype

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """The tokens of a batch."""
        ids = encode_documents(self._tokenizer, texts, eos_token=self._eos_token)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.empty(int(lengths.sum()), self._dtype)
        start = 0
        for document in ids:
            tokens[start : start + len(document)] = document
            start += len(document)
        return tokens, lengths


def encode_batches(
    batches: Iterable[Sequence[str]],
    tokenizer: Tokenizer,
    *,
    eos_token: str,
    dtype: type[np.number],
    workers: int | None,
) -> Iterator[Encoded]:
    """Encode batches in their order.

    Args:
        batches: Texts; read a few batches ahead.
        tokenizer: The tokenizer.
        eos_token: Its end of text.
        dtype: Of the tokens.
        workers: Processes, each with one thread; 1 for this one.  None for this one with a thread
            for each core.

    Raises:
        UserError: A process was killed.
    """
    encoder = BatchEncoder(tokenizer, eos_token, dtype)
    if workers is None:
        yield from map(encoder, batches)
    elif workers == 1:
        for batch in batches:
            before = os.environ.get(_THREADS_VARIABLE)
            os.environ[_THREADS_VARIABLE] = "false"
            try:
                encoded = encoder(batch)
            finally:
                _restore(before)
            yield encoded
    else:
        yield from _encode_in_pool(batches, encoder, tokenizer, workers)


def _restore(value: str | None) -> None:
    if value is None:
        del os.environ[_THREADS_VARIABLE]
    else:
        os.environ[_THREADS_VARIABLE] = value


def _encode_in_pool(
    batches: Iterable[Sequence[str]], encoder: BatchEncoder, tokenizer: Tokenizer, workers: int
) -> Iterator[Encoded]:
    arguments = (tokenizer.to_str(), encoder._eos_token, encoder._dtype)
    # Spawned: a fork would copy this process's threads' locks, but not the threads.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin_worker, arguments
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) > _BATCHES_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers {workers}: a process that encodes was killed, as a rule because memory was "
            "short. Remedy: fewer --workers, or more memory, and run again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# Of this process, a worker of the pool: set once, when it begins.
_encoder: list[BatchEncoder] = []


def _begin_worker(tokenizer: str, eos_token: str, dtype: type[np.number]) -> None:
    os.environ[_THREADS_VARIABLE] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder.append(BatchEncoder(Tokenizer.from_str(tokenizer), eos_token, dtype))


def _end_with_parent() -> None:
    """A worker waits for work for ever; its parent may have been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: Sequence[str]) -> Encoded:
    (encode,) = _encoder
    return encode(texts)
