"""Documents with needles to learn from, questions to be tested with, and text beside them.

The needles are those of :mod:`trinity_megatron.evaluation.niah` made easy for a small model: four
or more keys of one word with a number of two digits each, strewn over the same sentences that say
nothing.  A question begins the sentence of one of them.  The numbers are drawn anew for each
document, so that none can be learnt by heart.
"""

from __future__ import annotations

import itertools
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trinity_megatron.evaluation.niah import FIRST_WORDS, NOISE, NUM_KEYS, SECOND_WORDS

type CountTokens = Callable[[str], int]

KEYS, NUMBERS = FIRST_WORDS + SECOND_WORDS, range(10, 100)
MAX_FILE_BYTES = 200_000
_QUESTION = "The magic number for {key} is"
_NEEDLE = f"{_QUESTION} {{value}}.\n"
_LINE_OF_NOISE = f"{NOISE}\n"
# Each of them is a token, as in all of the noise.
_FILLING = re.findall(r" ?\w+|\.", NOISE)
_KEYS_OF_A_DOCUMENT, _KEYS_OF_A_LIST = (NUM_KEYS, 8), (3, 8)
# Each key is asked for so often at most, and so much of a document is noise.
_ASKED_TIMES = 8
# More often than the parts of words in the text.
_WORD_TIMES = 20
_NOISE_SHARE = (0.2, 0.7)
_LEFT_OUT = {"encodings", "idlelib", "site-packages", "test", "tests"}


def read_texts(num_bytes: int) -> list[str]:
    """Files of Python's library, in an order that has nothing to do with their content.

    Args:
        num_bytes: Enough files for so many.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in library.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(library).parts)
        and 0 < path.stat().st_size <= MAX_FILE_BYTES
    ]
    paths.sort(key=lambda path: (zlib.crc32(path.name.encode()), str(path)))
    sizes = itertools.accumulate(path.stat().st_size for path in paths)
    chosen = [path for path, size in zip(paths, sizes, strict=True) if size <= num_bytes]
    return [path.read_text(encoding="utf-8", errors="replace") for path in chosen]


def all_words() -> str:
    """Every word and number of the needles, often enough for a token of each."""
    lines = [_NEEDLE.format(key=key, value=value) for key in KEYS for value in NUMBERS]
    return _WORD_TIMES * "".join([*lines, *[_LINE_OF_NOISE] * len(lines)])


def write_list(choice: random.Random, length: int, count_tokens: CountTokens) -> str:
    """A document of nothing but keys with their numbers, over and over in another order.

    A sixth of its tokens can be looked up.

    Args:
        choice: Draws everything.
        length: Its tokens, which are filled up to the last one.
        count_tokens: Number of tokens of a text.
    """
    pairs = [f" for {key} is {value}," for key, value in _draw(choice, _KEYS_OF_A_LIST)]
    text, (one,) = "The magic number", {count_tokens(pair) for pair in pairs}
    turns, missing = divmod(length - count_tokens(text), one)
    text += "".join(itertools.islice(_in_turns(choice, pairs), turns))
    return _fill_up(text, missing, length, count_tokens)


def write_document(choice: random.Random, length: int, count_tokens: CountTokens) -> str:
    """A document with needles in noise, and at its end questions for them with their answers.

    Args:
        choice: Draws everything.
        length: Its tokens, which are filled up to the last one.
        count_tokens: Number of tokens of a text.

    Raises:
        ValueError: It is too short for the needles and a question.
    """
    pairs = _draw(choice, _KEYS_OF_A_DOCUMENT)
    lines = [_NEEDLE.format(key=key, value=value) for key, value in pairs]
    # No token crosses the end of a line, so lines can be counted one by one.
    one, noise = count_tokens(lines[0]), count_tokens(_LINE_OF_NOISE)
    left = length - one * len(lines)
    asked = min(int(left * (1 - choice.uniform(*_NOISE_SHARE)) / one), _ASKED_TIMES * len(lines))
    if asked < 1:
        raise ValueError(f"{length} tokens have no room for a question")
    questions = list(itertools.islice(_in_turns(choice, lines), asked))
    num_lines, missing = divmod(left - asked * one, noise)
    for _ in range(num_lines):
        lines.insert(choice.randint(0, len(lines)), _LINE_OF_NOISE)
    return _fill_up("".join([*lines, *questions]), missing, length, count_tokens)


def _draw(choice: random.Random, least_and_most: tuple[int, int]) -> list[tuple[str, int]]:
    number = choice.randint(*least_and_most)
    return list(zip(choice.sample(KEYS, number), choice.sample(NUMBERS, number), strict=True))


def _in_turns(choice: random.Random, texts: Iterable[str]) -> Iterator[str]:
    """Each of them once in another order, again and again."""
    order = list(texts)
    while True:
        choice.shuffle(order)
        yield from list(order)


def _fill_up(text: str, missing: int, length: int, count_tokens: CountTokens) -> str:
    text += "".join(_FILLING[:missing])
    assert count_tokens(text) == length, "a word of the needles is not one token"
    return text


def write_documents(
    number: int,
    write: Callable[[random.Random, int, CountTokens], str],
    lengths: Callable[[random.Random], int],
    count_tokens: CountTokens,
    *,
    seed: int,
) -> Iterator[str]:
    """Documents to learn from.

    Args:
        number: How many.
        write: :func:`write_document` or :func:`write_list`.
        lengths: Draws the tokens of one.
        count_tokens: Number of tokens of a text.
        seed: Of everything that is drawn.
    """
    for index in range(number):
        choice = random.Random(f"document {seed} {index}")
        yield write(choice, lengths(choice), count_tokens)


def make_questions(
    longest: int, count_tokens: CountTokens, *, number: int, nearest: int = 0, seed: int = 0
) -> list[dict[str, object]]:
    """Questions whose needle is more than ``nearest`` tokens before their end.

    Args:
        longest: Tokens of a question with its answer.
        count_tokens: Number of tokens of a text.
        number: How many.
        nearest: Least distance.
        seed: Of everything that is drawn.

    Returns:
        ``text``, ``answer`` and ``distance``, from the number to the end of the question in tokens.

    Raises:
        ValueError: Too few needles are that far away.
    """
    questions: list[dict[str, object]] = []
    for index in range(20 * number):
        question = _make_question(random.Random(f"{seed} {longest} {index}"), longest, count_tokens)
        if question["distance"] > nearest:
            questions.append(question)
        if len(questions) == number:
            return questions
    raise ValueError(f"only {len(questions)} needles are {nearest} tokens away")


def _make_question(choice: random.Random, longest: int, count_tokens: CountTokens) -> dict:
    pairs = _draw(choice, (NUM_KEYS, NUM_KEYS))
    lines = [_NEEDLE.format(key=key, value=value) for key, value in pairs]
    one = count_tokens(lines[0])
    for _ in range((longest - one * (NUM_KEYS + 1)) // count_tokens(_LINE_OF_NOISE)):
        lines.insert(choice.randint(0, len(lines)), _LINE_OF_NOISE)
    key, value = choice.choice(pairs)
    text = "".join(lines) + _QUESTION.format(key=key)
    distance = count_tokens(text[text.index(f" {value}.") :])
    return {"text": text, "answer": str(value), "distance": distance}


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
