"""Small corpora of raw text, and a tokenizer."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer

Write = Callable[..., list[str]]


def make_texts(count: int, longest: int, seed: int) -> list[str]:
    """Texts of some words, some with line ends and letters of several bytes."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnop äßµ€漢 \n"
    return [
        f"{seed} {number} " + "".join(generator.choices(letters, k=generator.randrange(longest)))
        for number in range(count)
    ]


def as_lines(texts: list[str]) -> bytes:
    """JSON Lines, among which some are empty."""
    lines = [
        json.dumps({"id": n, "text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)
    ]
    return "\n\n".join(lines).encode() + b"\n"


def write_lines(path: Path, texts: list[str]) -> None:
    """A file of JSON Lines, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = as_lines(texts)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(make_texts(200, 900, 7), vocab_size=400), folder)
    return folder
