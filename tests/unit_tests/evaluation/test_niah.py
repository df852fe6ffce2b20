"""Needles in a haystack: made alike, of the right length, and answerable."""

import pytest

from trinity_megatron.evaluation.niah import MAX_NEW_TOKENS, NUM_KEYS, make_samples, score


def count_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("length", [300, 1024])
def test_questions_fill_the_length_and_fit(length: int) -> None:
    sizes = [count_words(sample.text) for sample in make_samples(length, count_words)]
    assert max(sizes) <= length - MAX_NEW_TOKENS
    assert min(sizes) > 0.75 * length - MAX_NEW_TOKENS


def test_the_answer_stands_once_beside_its_key_among_others() -> None:
    for sample in make_samples(512, count_words, number=20):
        key = sample.text.rsplit("magic number for ", 1)[1].split()[0]
        needles = [line for line in sample.text.split("\n") if line.startswith("One of the")]
        assert len(needles) == NUM_KEYS
        assert [line for line in needles if f" {key} is: {sample.answer}." in line]
        assert sample.text.count(sample.answer) == 1
        assert sample.text.endswith(f"{key} mentioned in the provided text is")


def test_depths_cover_the_text() -> None:
    depths = [sample.depth for sample in make_samples(1024, count_words)]
    assert min(depths) < 0.1
    assert max(depths) > 0.9


def test_same_arguments_same_questions() -> None:
    first, again = (make_samples(400, count_words, number=3) for _ in range(2))
    assert first == again
    assert make_samples(400, count_words, seed=1, number=3) != first
    # More questions begin with the same ones.
    assert make_samples(400, count_words, number=5)[:3] == first


def test_too_short() -> None:
    with pytest.raises(ValueError, match="tokens are the fewest"):
        make_samples(60, count_words)


def test_recall() -> None:
    assert score({"answer": "1234567"}, [" is 1234567, of course"]) == {"recall": 1.0}
    assert score({"answer": "1234567"}, [" 123456"]) == {"recall": 0.0}
