"""The file of a mixture: what it says, and what is refused by name."""

from fractions import Fraction
from pathlib import Path

import pytest

from trinity_megatron.data.mixture.definition import is_mixture
from trinity_megatron.data.mixture.mixture_file import load_mixture
from trinity_megatron.data.mixture.quantities import format_tokens, parse_tokens
from trinity_megatron.errors import UserError

GOOD = """
corpora:
  web:  {path: data/web}
  code: {path: /data/code, language: python, max_epochs: 2.5}
phases:
  - {until: 10T, weights: {web: 0.7, code: 0.3}}
  - {until: 14T, weights: {web: 0.4, code: 0.6}}
  - {weights: {code: 5}}
order: rsdb
rsdb: {documents: 16}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mix.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    mixture = load_mixture(write(tmp_path, GOOD))
    assert mixture.corpora["web"].path == tmp_path / "data/web"
    assert mixture.corpora["code"].path == Path("/data/code")
    assert mixture.corpora["code"].language == "python"
    assert [phase.until for phase in mixture.phases] == [10 * 10**12, 14 * 10**12, None]
    # Exactly what is written, not the nearest binary fraction.
    assert mixture.phases[0].weights == {"code": Fraction(3, 10), "web": Fraction(7, 10)}
    assert mixture.phases[2].weights == {"code": Fraction(1)}
    assert (mixture.order, mixture.buffer.documents, mixture.end) == ("rsdb", 16, None)


def test_one_corpus_needs_no_phases(tmp_path: Path) -> None:
    mixture = load_mixture(write(tmp_path, "corpora: {web: {path: web}}"))
    assert mixture.phases[0].weights == {"web": Fraction(1)}


TWO = "corpora: {web: {path: a}, code: {path: b}}\n"
BIASED = "corpora: {{a: {{path: x, length_bias: {0}}}}}\norder: rsdb"
BOTH = "weights: {web: 1, code: 1}"
BAD = {
    "not YAML": ("corpora: [", "is no YAML file", "line"),
    "a list": ("- web", "the file is a list"),
    "an empty file": ("", "the file is missing or empty"),
    "no corpora": ("phases: []", "has no corpora"),
    "empty corpora": ("corpora: {}", "corpora is empty"),
    "an unknown key": (TWO + "phase: []", "unknown key 'phase'", "phases"),
    "a key given twice": ("corpora: {a: {path: a}, a: {path: b}}", "'a' is given twice"),
    "a corpus without a path": ("corpora: {web: {language: en}}", "corpora.web has no path"),
    "a corpus as text": ("corpora: {web: data/web}", "corpora.web is a text"),
    "a name with a space": ("corpora: {a b: {path: a}}", "'a b'"),
    "no field": ("corpora: {a: {path: x, text_key: 3}}", "corpora.a.text_key is 3"),
    "bad rows as a number": ("corpora: {a: {path: x, skip_bad_rows: 3}}", "skip_bad_rows is 3"),
    "Norwegian": ("corpora: {a: {path: x, language: no}}", "corpora.a.language is False", "'no'"),
    "negative epochs": ("corpora: {a: {path: x, max_epochs: -1}}", "max_epochs is -1"),
    "a bias as a number": (BIASED.format("0.5"), "length_bias is the number 0.5"),
    "a floor of 0": (BIASED.format("{floor: 0}"), "length_bias.floor is 0"),
    "a ceiling above 1": (BIASED.format("{ceiling: 2}"), "length_bias.ceiling is 2"),
    "a bias to no length": (BIASED.format("{tokens: x}"), "length_bias.tokens 'x'"),
    "a bias without documents": ("corpora: {a: {path: x, length_bias: {}}}", "order: shuffled"),
    "no phases": (TWO, "phases is missing"),
    "empty phases": (TWO + "phases: []", "phases is empty"),
    "an empty phase": (TWO + f"phases: [{{until: 1T, {BOTH}}}, {{until: 1T, {BOTH}}}]",
                       "phases[1].until is 1T", "empty or out of order"),
    "phases out of order": (TWO + f"phases: [{{until: 2T, {BOTH}}}, {{until: 1T, {BOTH}}}]",
                            "phases[1].until is 1T", "ends at 2.00T"),
    "no end": (TWO + f"phases: [{{{BOTH}}}, {{until: 1T, {BOTH}}}]", "phases[0] has no until"),
    "no number": (TWO + f"phases: [{{until: ten, {BOTH}}}]", "phases[0].until 'ten'"),
    "half a token": (TWO + f"phases: [{{until: 0.5, {BOTH}}}]", "no whole number"),
    "no tokens": (TWO + f"phases: [{{until: 0, {BOTH}}}]", "not between 1 token"),
    "a weight of 0": (TWO + "phases: [{weights: {web: 0, code: 1}}]", "weights.web is 0"),
    "a negative weight": (TWO + "phases: [{weights: {web: -1, code: 1}}]", "weights.web is -1"),
    "no weights": (TWO + "phases: [{weights: {}}]", "phases[0].weights is empty"),
    "a weight as text": (TWO + "phases: [{weights: {web: a, code: 1}}]", "weights.web is 'a'"),
    "a weight of infinity": (TWO + "phases: [{weights: {web: .inf, code: 1}}]", "is inf"),
    "a weight that is true": (TWO + "phases: [{weights: {web: true, code: 1}}]", "is True"),
    "an unknown corpus": (TWO + "phases: [{weights: {web: 1, cod: 1}}]", "weights.cod", "code"),
    "a corpus without weight": (TWO + "phases: [{weights: {web: 1}}]", "corpora.code has no"),
    "an unknown order": (TWO + f"phases: [{{{BOTH}}}]\norder: random", "order is 'random'", "rsdb"),
    "buffer without order": (TWO + f"phases: [{{{BOTH}}}]\nrsdb: {{}}", "order: shuffled"),
    "buffer of 0": (TWO + f"phases: [{{{BOTH}}}]\norder: rsdb\nrsdb: {{documents: 0}}",
                    "rsdb.documents is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused(name: str, tmp_path: Path) -> None:
    text, *expected = BAD[name]
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_mixture(path)
    for words in (str(path), "Remedy: ", *expected):
        assert words in str(error.value), str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yml"):
        load_mixture(tmp_path / "none.yml")


def test_what_is_a_mixture(tmp_path: Path) -> None:
    assert is_mixture("mix.yaml") and is_mixture("a/mix.YML")
    (tmp_path / "folder.yaml").mkdir()
    assert (
        not is_mixture(tmp_path / "folder.yaml") and not is_mixture("data") and not is_mixture(None)
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("10T", 10**13), ("2.5b", 25 * 10**8), ("400 M", 4 * 10**8), ("1e9", 10**9),
     (65536, 65536), (1.5e6, 1500000), ("1_000", 1000), ("3K", 3000)],
)  # fmt: skip
def test_tokens(text: object, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "T", "-1T", "1 T T", "1e19", None, True, [1], "nan", "1.0001K"]
)
def test_what_is_no_number_of_tokens(text: object) -> None:
    with pytest.raises(ValueError):
        parse_tokens(text)


def test_tokens_in_words() -> None:
    assert [format_tokens(n) for n in (512, 65536, 10**13)] == ["512", "65.54K", "10.00T"]
