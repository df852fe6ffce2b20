"""Documents with needles to learn from, questions to be tested with, and text beside them.

Both are in the words of :mod:`trinity_megatron.evaluation.niah`: four or more keys with a number
each, strewn over sentences that say nothing.  A document to learn from asks for several of its keys
and gives the answers; a question of the test is one of niah's own, whose needle lies so many tokens
before its end.  The numbers are drawn anew for each, so that none can be learnt by heart.
"""

from __future__ import annotations

import itertools
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trinity_megatron.evaluation import niah

type CountTokens = Callable[[str], int]

MAX_FILE_BYTES = 200_000
_KEYS_OF_A_DOCUMENT = (4, 6)
# Each key is asked for so often at most, and so much of the room beside the needles is noise.
_ASKED_TIMES = 3
_NOISE_SHARE = (0.05, 0.5)
# Each of them is a token, as in all of the noise.
_FILLING = re.findall(r" ?\w+|\.", niah.NOISE)
_LEFT_OUT = {"encodings", "idlelib", "site-packages", "test", "tests"}


def read_texts() -> list[str]:
    """Files of Python's library, in an order that has nothing to do with their content."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in library.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(library).parts)
        and 0 < path.stat().st_size <= MAX_FILE_BYTES
    ]
    paths.sort(key=lambda path: (zlib.crc32(path.name.encode()), str(path)))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def all_words() -> str:
    """Every word of the documents with needles, and all groups of three digits.

    A tokenizer that has learnt from this, several times, has a token for each of them.
    """
    keys, _ = niah.draw_needles(random.Random(0), niah.NUM_KEYS_IN_ALL)
    lines = [
        f"{niah.NOISE}\n{niah.NEEDLE.format(key=key, value='')}{niah.QUESTION.format(key=key)}"
        for key in keys
    ]
    numbers = " ".join(f"{number:03}" for number in range(1000))
    return niah.BEFORE + "\n".join([*lines, *[niah.BEFORE.strip()] * len(lines), *[numbers] * 40])


def write_document(choice: random.Random, length: int, count_tokens: CountTokens) -> str:
    """A document with needles, and at its end questions for several of them with their answers.

    Args:
        choice: Draws everything.
        length: Its tokens, which are filled up to the last one.
        count_tokens: Number of tokens of a text.

    Raises:
        ValueError: It is too short for four keys and a question.
    """
    keys, values = niah.draw_needles(choice, choice.randint(*_KEYS_OF_A_DOCUMENT))
    pairs = list(zip(keys, values, strict=True))
    lines = [f"{niah.NEEDLE.format(key=key, value=value)}\n" for key, value in pairs]
    # No token crosses the end of a line, so lines can be counted one by one.
    left = length - count_tokens(niah.BEFORE) - sum(map(count_tokens, lines))
    for_noise = choice.uniform(*_NOISE_SHARE) * left
    asked: list[str] = []
    order = [pair for _ in range(_ASKED_TIMES) for pair in choice.sample(pairs, len(pairs))]
    for key, value in order:
        question = f"{niah.QUESTION.format(key=key)[1:]} {value}.\n"
        if left - count_tokens(question) < for_noise:
            break
        asked.append(question)
        left -= count_tokens(question)
    if not asked:
        raise ValueError(f"{length} tokens have no room for a question")
    noise = f"{niah.NOISE}\n"
    num_lines, missing = divmod(left, count_tokens(noise))
    for _ in range(num_lines):
        lines.insert(choice.randint(0, len(lines)), noise)
    text = niah.BEFORE + "".join([*lines, *asked]) + "".join(_FILLING[:missing])
    assert count_tokens(text) == length, "a word of the noise is not one token"
    return text


def write_documents(
    number: int, lengths: Callable[[random.Random], int], count_tokens: CountTokens, *, seed: int
) -> Iterator[str]:
    """Documents with needles.

    Args:
        number: How many.
        lengths: Draws the tokens of one.
        count_tokens: Number of tokens of a text.
        seed: Of everything that is drawn.
    """
    for index in range(number):
        choice = random.Random(f"document {seed} {index}")
        yield write_document(choice, lengths(choice), count_tokens)


def make_questions(
    longest: int, count_tokens: CountTokens, *, number: int, nearest: int = 0, seed: int = 0
) -> list[dict[str, object]]:
    """Questions of niah whose needle is more than ``nearest`` tokens before their end.

    Args:
        longest: Tokens of a question with its answer.
        count_tokens: Number of tokens of a text.
        number: How many.
        nearest: Least distance.
        seed: Of niah's samples.

    Returns:
        ``text``, ``answer`` and ``distance``, from the number to the end of the question in tokens.

    Raises:
        ValueError: Too few needles are that far away.
    """
    questions: list[dict[str, object]] = []
    for sample in niah.make_samples(longest, count_tokens, seed=seed, number=8 * number):
        distance = count_tokens(sample.text[sample.text.index(sample.answer) :])
        if distance > nearest:
            questions.append({"text": sample.text, "answer": sample.answer, "distance": distance})
        if len(questions) == number:
            return questions
    raise ValueError(f"only {len(questions)} needles are {nearest} tokens away")


def cut_texts(
    texts: Iterable[str], longest: int, count_tokens: CountTokens, number: int
) -> list[str]:
    """Pieces of texts, of whole lines and at most so many tokens, about as many of each text.

    Args:
        texts: Whole ones.
        longest: Most tokens of a piece.
        count_tokens: Number of tokens of a text.
        number: How many pieces, if there are as many.
    """
    pieces = [list(_cut(text, longest, count_tokens)) for text in texts]
    in_turns = itertools.chain.from_iterable(itertools.zip_longest(*pieces))
    return [piece for piece in in_turns if piece][:number]


def _cut(text: str, longest: int, count_tokens: CountTokens) -> Iterator[str]:
    piece, size = "", 0
    for line in text.splitlines(keepends=True):
        tokens = count_tokens(line)
        if size + tokens > longest:
            if piece:
                yield piece
            piece, size = "", 0
        # Tokens that cross the end of a line make a piece shorter, not longer.
        if tokens <= longest:
            piece, size = piece + line, size + tokens
    if piece:
        yield piece
