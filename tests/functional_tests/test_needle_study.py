"""The needle study: its documents can be answered, and its verdict follows the numbers."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.functional_tests.launch import ROOT, environment, load_of_study, only_in_all
from trinity_megatron.evaluation.niah import NOISE, NUM_KEYS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STUDY = ROOT / "examples" / "needle_study"
GROUPS = (512, 1024, 2048, 4096)


@pytest.fixture(scope="module")
def haystacks() -> ModuleType:
    """The module of the study that writes documents and questions."""
    return load_of_study("needle_study", "haystacks")


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The module of the study that judges."""
    return load_of_study("needle_study", "results")


def count_tokens(text: str) -> int:
    """Words and punctuation, as a tokenizer that has them all."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("length", [300, 511, 4095])
@pytest.mark.parametrize("write", ["write_document", "write_list"])
def test_documents_to_learn_from(write: str, length: int, haystacks: ModuleType) -> None:
    documents = list(
        haystacks.write_documents(
            20, getattr(haystacks, write), lambda _: length, count_tokens, seed=1
        )
    )
    assert [count_tokens(text) for text in documents] == [length] * 20
    assert len(set(documents)) == 20
    for text in documents:
        pairs = re.findall(r" for (\w+) is (\d\d)[.,]", text)
        needles = dict(pairs)
        # Each number can be looked up, and is of one key alone.
        assert set(pairs) == set(needles.items())
        assert len(set(needles.values())) == len(needles) < len(pairs)
        if write == "write_document":
            assert len(needles) >= NUM_KEYS and NOISE in text


def test_a_document_that_is_too_short(haystacks: ModuleType) -> None:
    with pytest.raises(ValueError, match="36 tokens have no room"):
        haystacks.write_document(random.Random(0), 36, count_tokens)


def test_needles_lie_as_far_away_as_asked(haystacks: ModuleType) -> None:
    for nearest, longest in zip((0, *GROUPS), GROUPS, strict=False):
        questions = haystacks.make_questions(longest, count_tokens, number=12, nearest=nearest)
        assert len(questions) == 12
        for question in questions:
            text, answer = question["text"], question["answer"]
            distance = count_tokens(text[text.index(answer) :])
            assert question["distance"] == distance
            assert nearest < distance < count_tokens(text) < longest
            assert text.count("The magic number for") == NUM_KEYS + 1
            key = re.findall(r"magic number for (\w+) is$", text)[0]
            assert f" for {key} is {answer}." in text
    with pytest.raises(ValueError, match="needles are 2000 tokens away"):
        haystacks.make_questions(1024, count_tokens, number=2, nearest=2000)


def test_short_texts(haystacks: ModuleType) -> None:
    texts = ["a b\nc d\n" * 10, "one two three four five six seven\n", "x\ny\n"]
    pieces = haystacks.cut_texts(texts, 6, count_tokens, 100)
    assert all(0 < count_tokens(piece) <= 6 for piece in pieces)
    # The line that does not fit is left out, and nothing else.
    assert sorted("".join(pieces)) == sorted(texts[0] + texts[2])
    assert pieces[:2] == ["a b\nc d\na b\n", "x\ny\n"]
    assert haystacks.cut_texts(texts, 6, count_tokens, 3) == pieces[:3]


def make_run(results: ModuleType, arm: str, rates: tuple[float, ...], loss: float) -> object:
    right = {group: round(100 * rate) for group, rate in zip(GROUPS, rates, strict=True)}
    return results.Run(arm, 1, right, dict.fromkeys(GROUPS, 100), loss)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((1.0, 0.5, 0.1, 0.0), (1.0, 0.95, 0.92, 0.90), "0.90 against 0.00: holds."),
        ((1.0, 0.5, 0.1, 0.0), (1.0, 0.95, 0.92, 0.89), "below 0.9 at 2048 to 4096 tokens."),
        ((1.0, 0.9, 0.1, 0.0), (1.0, 1.0, 1.0, 1.0), "retrieves too at 512 to 1024 tokens."),
        # Near needles are not what is claimed.
        ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 1.0, 1.0), ": holds."),
    ],
)
def test_retrieval(
    before: tuple[float, ...], after: tuple[float, ...], verdict: str, results: ModuleType
) -> None:
    runs = [
        make_run(results, "short", before, 3.0),
        make_run(results, "extended", after, 3.0),
    ]
    retrieval, loss = results.statements(runs)
    assert retrieval.endswith(verdict) and retrieval.startswith("seed 1, against 'before'")
    assert "(+0.0000): holds." in loss


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(2.5, ": holds."), (3.009, ": holds."), (3.02, "does not hold, more than 0.01 worse.")],
)
def test_loss_on_short_text(after: float, verdict: str, results: ModuleType) -> None:
    rates = (1.0, 1.0, 1.0, 1.0)
    runs = [make_run(results, "short", rates, 3.0), make_run(results, "extended", rates, after)]
    assert results.statements(runs)[1].endswith(verdict)


def test_scores_of_the_harness_are_read(results: ModuleType, tmp_path: Path) -> None:
    folder = results.run_folder(tmp_path, "short", 1)
    assert results.find_evaluation(folder) is None
    scores = {f"needle_{group}": {"exact_match,number": 0.29} for group in GROUPS}
    samples = {name: {"original": 100, "effective": 100} for name in scores}
    content = {
        "results": {**scores, "perplexity_text": {"bits_per_byte,none": 1.5}},
        "n-samples": samples,
    }
    for path, value in (
        (folder / "evaluation" / "7.json", content),
        (folder / "evaluation" / "6.json", {"results": {}}),
        (tmp_path / "questions" / "sizes.json", {"num_bytes": 300, "num_tokens": 100}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    run = results.read_run(tmp_path, "short", 1)
    assert run.right == dict.fromkeys(GROUPS, 29) and run.rate(1024, 2048) == 0.29
    assert run.loss == pytest.approx(math.log(2**1.5) * 3)
    table = results.write_results([run], tmp_path, settings={})
    assert "| before | 1 | 29 of 100 | " in table
    assert results.load_results(tmp_path) == [run]


@only_in_all
def test_one_command_trains_extends_asks_and_draws(tmp_path: Path) -> None:
    flags = (
        "--steps 2 --list-steps 1 --extension-steps 2 --questions 2 --documents 20 40 20".split()
    )
    result = subprocess.run(
        [sys.executable, str(STUDY / "run.py"), "--out", str(tmp_path / "out"), *flags],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["arm"] for run in content["runs"]] == ["short", "continued", "extended"]
    losses = [run["loss"] for run in content["runs"]]
    assert len(set(losses)) == 3 and all(0 < loss < 20 for loss in losses)
    assert "does not hold, below 0.9 at" in result.stdout
    assert (tmp_path / "out" / "needle_study.png").read_bytes().startswith(b"\x89PNG")
