"""A retrieval test, made on the spot: several needles in a long text, one of which is asked for.

RULER's multi-key needle in a haystack ("MK-NIAH"): four keys with a number each, strewn over
sentences that say nothing, and the number of one key as the answer.  The haystack is that of
RULER's ``type_haystack="repeat"``, which needs no download; keys are pairs of English words.

Source: arXiv 2404.06654, appendix B; templates of its ``niah``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NUM_SAMPLES = 100
NUM_KEYS = 4
MAX_NEW_TOKENS = 32
_DIGITS = 7
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_BEFORE = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? The special "
    "magic number for {key} mentioned in the provided text is"
)
FIRST_WORDS = (
    "able",
    "bright",
    "calm",
    "distant",
    "early",
    "famous",
    "gentle",
    "hollow",
    "idle",
    "jolly",
    "kind",
    "loud",
    "modern",
    "narrow",
    "orange",
    "plain",
    "quiet",
    "rapid",
    "silver",
    "tall",
)
SECOND_WORDS = (
    "anchor",
    "basket",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "market",
    "needle",
    "orchard",
    "pencil",
    "river",
    "saddle",
    "temple",
    "window",
)


@dataclass(frozen=True)
class Sample:
    """A question.

    Attributes:
        text: With the beginning of its answer.
        answer: The number.
        depth: Share of the haystack before the needle that is asked for.
    """

    text: str
    answer: str
    depth: float


def make_samples(
    length: int, count_tokens: Callable[[str], int], *, seed: int = 0, number: int = NUM_SAMPLES
) -> list[Sample]:
    """Questions that fill a length: the same for the same arguments.

    Args:
        length: Tokens of a question and its answer together.
        count_tokens: Number of tokens of a text.
        seed: Of the choice of keys, numbers and places.
        number: How many.

    Raises:
        ValueError: Not even the needles fit.
    """
    lines = _fit_haystack(length - MAX_NEW_TOKENS, count_tokens, random.Random(f"{seed} {length}"))
    return [
        _make_sample(random.Random(f"{seed} {length} {index}"), lines) for index in range(number)
    ]


def _make_sample(choice: random.Random, num_lines: int) -> Sample:
    keys = choice.sample([f"{a}-{b}" for a in FIRST_WORDS for b in SECOND_WORDS], NUM_KEYS)
    values = choice.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), NUM_KEYS)
    places = sorted(choice.randint(0, num_lines) for _ in keys)
    lines = [NOISE] * num_lines
    for before, (place, key, value) in enumerate(zip(places, keys, values, strict=True)):
        lines.insert(place + before, _NEEDLE.format(key=key, value=value))
    asked = choice.randrange(NUM_KEYS)
    text = _BEFORE + "\n".join(lines) + _QUESTION.format(key=keys[asked])
    return Sample(text, str(values[asked]), places[asked] / max(num_lines, 1))


def _fit_haystack(length: int, count_tokens: Callable[[str], int], choice: random.Random) -> int:
    """Most lines of noise with which every one of a few questions fits."""
    seeds = [choice.random() for _ in range(4)]

    def longest(num_lines: int) -> int:
        made = (_make_sample(random.Random(seed), num_lines) for seed in seeds)
        return max(count_tokens(sample.text) for sample in made)

    spare = _DIGITS * NUM_KEYS  # other keys and numbers may be longer
    fits, too_many = 0, 1
    if longest(0) + spare > length:
        raise ValueError(f"{longest(0) + spare + MAX_NEW_TOKENS} tokens are the fewest")
    while longest(too_many) + spare <= length:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if longest(middle) + spare <= length else (fits, middle)
    return fits


def score(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Whether the number stands in an answer; in the form of the harness's ``process_results``."""
    return {"recall": float(doc["answer"] in answers[0])}
