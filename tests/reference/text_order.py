"""The sequences of raw text, one after the other: slow and by itself.

Files are lists of the texts of their rows and where each row begins; nothing of the package but the
pseudo-random permutation, which has a test of its own, is asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from trinity_megatron.data.rsdb.permutation import permute

Encode = Callable[[str], list[int]]


def make_encoder(tokenizer: Path) -> Encode:
    """Tokens of a document by transformers, and the token that ends it."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(str(tokenizer))

    def encode(text: str) -> list[int]:
        ids = made(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, made.eos_token_id]

    return encode


def cut_lines(path: Path, size: int, least: int) -> list[list[str]]:
    """The texts of a file of JSON Lines by part: the lines that begin in each range of bytes."""
    content = path.read_bytes()
    count = max(least, -(-len(content) // size))
    bounds = [len(content) * part // count for part in range(count + 1)]
    parts: list[list[str]] = [[] for _ in range(count)]
    position = 0
    for line in content.splitlines(keepends=True):
        part = max(p for p in range(count) if bounds[p] <= position)
        if line.strip():
            parts[part].append(json.loads(line)["text"])
        position += len(line)
    return parts


def deal_rows(texts: Sequence[str], count: int) -> list[list[str]]:
    """The texts of a compressed file by part."""
    return [list(texts[part::count]) for part in range(count)]


def documents_of(
    name: str,
    parts: Sequence[Sequence[str]],
    *,
    seed: int,
    stream: int,
    streams: int,
    shuffled: bool,
) -> Iterator[str]:
    """The documents of a stream, for ever."""
    place = stream
    while True:
        epoch, within = divmod(place, len(parts))
        if shuffled:
            digest = hashlib.sha256(f"{seed}\0{name}\0{epoch}".encode()).digest()
            key = int.from_bytes(digest[:8], "little")
            part = int(permute(np.array([within]), len(parts), key)[0])
        else:
            part = (within + epoch) % len(parts)
        yield from (text for text in parts[part] if text)
        place += streams


class Buffer:
    """The random sequential document buffer of a stream, as the report describes it.

    Args:
        feeds: Documents of each corpus, by name.
        weights: Of each phase.
        phase_of: The phase of a sample.
        prepared: Corpora that are tokenised: their documents have known lengths.
    """

    def __init__(
        self,
        feeds: dict[str, Iterator[str]],
        weights: Sequence[dict[str, int]],
        phase_of: Callable[[int], int],
        encode: Encode,
        *,
        documents: int,
        seed: int,
        stream: int,
        streams: int,
        prepared: Sequence[str] = (),
    ) -> None:
        self.prepared = prepared
        self.feeds, self.weights, self.phase_of, self.encode = feeds, weights, phase_of, encode
        self.documents, self.stream, self.streams = documents, stream, streams
        self.bits = np.random.Philox(key=[seed, stream])
        self.sample = stream
        self.phase = 0
        self.fed = dict.fromkeys(feeds, 0)
        # [corpus, phase, text, tokens or None, head]
        self.held: list[list] = []

    def refill(self) -> None:
        phase = self.phase_of(self.sample)
        while len(self.held) < 2 * self.documents:
            if phase != self.phase:
                self.phase, self.fed = phase, dict.fromkeys(self.fed, 0)
            weights = self.weights[phase]
            name = min(weights, key=lambda n: (Fraction(self.fed[n], weights[n]), n))
            text = next(self.feeds[name])
            self.fed[name] += self.estimate(name, text)
            self.held.append([name, phase, text, None, 0])

    def estimate(self, name: str, text: str) -> int:
        if name in self.prepared:
            return len(self.encode(text))
        return len(text.encode()) // 4 + 1

    def sequence(self, length: int) -> list[int]:
        made: list[int] = []
        while len(made) < length:
            if len(self.held) <= self.documents:
                self.refill()
            bits = int(self.bits.random_raw())
            place = bits * len(self.held) >> 64
            entry = self.held[place]
            name, phase, text, tokens, head = entry
            if tokens is None:
                tokens = entry[3] = self.encode(text)
                if phase == self.phase:
                    self.fed[name] += len(tokens) - self.estimate(name, text)
            taken = tokens[head : head + length - len(made)]
            made += taken
            entry[4] += len(taken)
            if entry[4] == len(tokens):  # the last one takes its place
                self.held[place] = self.held[-1]
                self.held.pop()
        self.sample += self.streams
        return made


def pack(texts: Iterator[str], encode: Encode) -> Iterator[int]:
    """Tokens of documents one after the other."""
    for text in texts:
        yield from encode(text)
