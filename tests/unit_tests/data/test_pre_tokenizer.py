"""Trinity's pre-tokenization."""

import pytest

from trinity_megatron.data.pre_tokenizer import get_pre_tokenizer


def pieces(text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in get_pre_tokenizer().pre_tokenize_str(text)]


def from_the_right(digits: str) -> list[str]:
    """Slow reference: groups of three counted from the end."""
    groups = []
    while digits:
        groups.insert(0, digits[-3:])
        digits = digits[:-3]
    return groups


@pytest.mark.parametrize("length", [*range(1, 14), 3000, 3001])
def test_digits_are_cut_in_threes_from_the_right(length):
    digits = ("1234567890" * (length // 10 + 1))[:length]

    assert pieces(digits) == from_the_right(digits)
    assert pieces(f"x={digits};") == ["x", "=", *from_the_right(digits), ";"]
    assert pieces(f"a {digits}b") == ["a", " ", *from_the_right(digits), "b"]
    assert pieces(f"{digits}.{digits}\n") == [
        *from_the_right(digits),
        ".",
        *from_the_right(digits),
        "\n",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world, again", ["Hello", " world", ",", " again"]),
        ("don't self.name(arg)", ["don", "'t", " self", ".name", "(arg", ")"]),
        ("a  b\n\n  c", ["a", " ", " b", "\n\n", " ", " c"]),
        ("x == y;\r\nz", ["x", " ==", " y", ";\r\n", "z"]),
        ("e\u0301te\u0301 naïve", ["e\u0301te\u0301", " naïve"]),
        ("see 東京タワー12345階 there", ["see", " ", "東京タワー", "12", "345", "階", " there"]),
        ("한국어abc ภาษาไทย", ["한국어", "abc", " ", "ภาษาไทย"]),
        ("ok 😀😀", ["ok", " 😀😀"]),
    ],
)
def test_text_is_cut_as_in_trinity(text, expected):
    assert pieces(text) == expected
