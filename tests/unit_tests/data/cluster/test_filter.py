"""``data filter``: datatrove's steps from a file, with stages that all tasks go through together.

pip install 'trinity_megatron[cluster]' spacy and python -m pytest tests/unit_tests/data/cluster
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trinity_megatron.cli.main import main
from trinity_megatron.data.corpus import Document, find_files, read_documents

pytest.importorskip("datatrove", reason="pip install 'trinity_megatron[cluster]'")
pytest.importorskip("orjson", reason="pip install 'trinity_megatron[cluster]'")


def write_web(folder: Path) -> list[str]:
    """Rows in three files; some are for a filter, some nearly the same."""
    folder.mkdir()
    texts = [
        f"Document {number} is about {number * 7 % 13} and more: "
        + " ".join(word((number * 31 + place * place) % 997) for place in range(60))
        for number in range(30)
    ]
    spoilt = [f"{text} lorem ipsum" for text in texts[:5]]
    copies = [f"{text} again" for text in texts[10:20]]
    rows = [*texts, *spoilt, *copies]
    for number in range(3):
        lines = [json.dumps({"text": text, "id": text[:12]}) for text in rows[number::3]]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return texts


def word(number: int) -> str:
    """Letters, for MinHash takes all numbers for the same."""
    letters = "abcdefghij"
    return "".join(letters[int(digit)] for digit in str(number))


def read_texts(folder: Path) -> list[str]:
    files, skipped = find_files([folder])
    assert not skipped
    return sorted(entry.text for entry in read_documents(files) if isinstance(entry, Document))


def write_steps(tmp_path: Path, steps: str) -> str:
    path = tmp_path / "steps.yaml"
    path.write_text(f"reader: {{JsonlReader: {{data_folder: {tmp_path / 'web'}}}}}\n{steps}")
    return str(path)


@pytest.mark.parametrize("tasks", [1, 4])
def test_a_filter(tasks: int, tmp_path: Path) -> None:
    texts = write_web(tmp_path / "web")
    steps = write_steps(tmp_path, "steps: [{RegexFilter: {regex_exp: lorem ipsum}}]")
    command = ["data", "filter", steps, "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--tasks", str(tasks)]) == 0
    expected = sorted([*texts, *(f"{text} again" for text in texts[10:20])])
    assert read_texts(tmp_path / "out" / "documents") == expected
    assert main([*command, "--tasks", str(tasks)]) == 0  # nothing is left to do
    assert main([*command, "--tasks", str(tasks + 1)]) == 2


def test_duplicates_in_different_tasks(tmp_path: Path) -> None:
    pytest.importorskip("spacy", reason="pip install 'trinity_megatron[cluster]'")
    texts = write_web(tmp_path / "web")
    steps = write_steps(
        tmp_path,
        """
steps:
  - RegexFilter: {regex_exp: lorem ipsum}
  - MinhashDedup: {n_grams: 3, num_buckets: 10, hashes_per_bucket: 4}
  - RegexFilter: {regex_exp: Document 29 }
""",
    )
    command = ["data", "filter", steps, "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--tasks", "3"]) == 0
    left = read_texts(tmp_path / "out" / "documents")
    # One of each text is left, be it the copy; and none that a step before or behind drops.
    assert sorted(text.removesuffix(" again") for text in left) == sorted(texts[:29])
    assert not (tmp_path / "out" / "stages").exists()


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("steps: [NoSuchFilter]", "'NoSuchFilter' is no class of datatrove.pipeline.filters"),
        ("steps: [{RegexFilter: {colour: red}}]", "step RegexFilter:"),
        ("steps: [{MinhashDedup: {colour: red}}]", "step MinhashDedup:"),
        ("steps: {RegexFilter: {}}", "steps is no list"),
        ("step: []", "other keys than reader and steps"),
        ("steps: [{RegexFilter: {regex_exp: 'Document'}}]", "no document is left"),
    ],
)
def test_what_is_wrong_is_named(
    steps: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_web(tmp_path / "web")
    path = write_steps(tmp_path, steps)
    command = ["data", "filter", path, "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--tasks", "1"]) == 2
    assert told in capsys.readouterr().err


def test_downloads_are_said(tmp_path: Path) -> None:
    from trinity_megatron.data.cluster.steps import DOWNLOADS, read_steps

    steps = read_steps(Path(write_steps(tmp_path, "steps: [LanguageFilter, {MinhashDedup: {}}]")))
    assert steps.downloads() == [f"LanguageFilter: {DOWNLOADS['LanguageFilter']}"]
