"""What ``--tasks`` and its companions may say."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.evaluation.task_choice import (
    TaskChoice,
    check_folder,
    check_numbers,
    split_lengths,
    split_names,
)


def choice(data: Path | None) -> TaskChoice:
    return TaskChoice(("perplexity",), data, (512,), tokenizer=None)


def test_names_keep_their_order() -> None:
    assert split_names("mmlu, niah,,mmlu") == ("mmlu", "niah")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_names(" ,"), "names no task"),
        (lambda: split_lengths("1k", 4096), "--niah-lengths 1k are no numbers"),
        (lambda: split_lengths("512,8192", 4096), "--niah-lengths 8192 is more than the 4096"),
        (lambda: check_numbers(batch_size=0), "--batch-size 0 is below 1"),
        (lambda: check_folder(Path("/none"), "--evaluate-data"), "--evaluate-data /none"),
        (
            lambda: choice(None).own_tasks("perplexity", list),
            "--data DIR with a file for each domain",
        ),
    ],
)
def test_refusals_name_the_flag(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        call()


def test_lengths() -> None:
    assert split_lengths(None, 4096) == (4096,)
    assert split_lengths("512, 4096", 4096) == (512, 4096)


def test_a_domain_for_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "perplexity"
    folder.mkdir()
    for name in ("web.jsonl", "code.parquet", "notes.txt", "README.md"):
        (folder / name).touch()
    tasks = choice(tmp_path).own_tasks("perplexity", list)
    assert tasks is not None
    assert [(task["task"], task["dataset_path"]) for task in tasks] == [
        ("perplexity_code", "parquet"),
        ("perplexity_notes", "text"),
        ("perplexity_web", "json"),
    ]
    assert choice(tmp_path).own_tasks("mmlu", list) is None


def test_niah_has_the_questions_of_its_length() -> None:
    def tokenizer(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.split())

    tasks = TaskChoice(("niah",), None, (300, 512), tokenizer).own_tasks("niah", list)
    assert tasks is not None
    assert [task["task"] for task in tasks] == ["niah_300", "niah_512"]
    rows = tasks[1]["custom_dataset"](config_source="inline")
    assert all(row["answer"] in row["text"] for row in rows)
    with pytest.raises(UserError, match="60 tokens are too short for --tasks niah"):
        TaskChoice(("niah",), None, (60,), tokenizer).own_tasks("niah", list)
