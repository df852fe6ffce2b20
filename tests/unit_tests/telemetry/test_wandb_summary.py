"""Numbers added to the summary of a W&B run that has ended, on real wandb, offline."""

from argparse import Namespace
from pathlib import Path

import pytest

from trinity_megatron.telemetry.wandb_file import read_records
from trinity_megatron.telemetry.wandb_run import ID_FILE, find_files, record_type
from trinity_megatron.telemetry.wandb_summary import add_to_summary

VALUES = {"eval/quiz/acc": 0.25, "eval/quiz/acc_stderr": 0.05}


def arguments(folder: Path) -> Namespace:
    return Namespace(
        wandb_project="p",
        wandb_exp_name="",
        wandb_entity="",
        wandb_save_dir=str(folder / "w"),
        save="where it was",
        out=None,
    )


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / ID_FILE).write_text("abcd1234\n")
    said = add_to_summary(arguments(tmp_path), tmp_path, VALUES)
    assert said is not None and "wandb sync" in said and "abcd1234" in said
    (file,) = {path.resolve() for path in find_files(tmp_path / "w", "abcd1234")}
    records = [record_type().FromString(record) for record in read_records(file.read_bytes())]
    updates = [u for r in records if r.HasField("summary") for u in r.summary.update]
    found = {update.key: float(update.value_json) for update in updates if update.key in VALUES}
    assert found == VALUES


def test_a_run_that_is_none_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert add_to_summary(arguments(tmp_path), tmp_path, VALUES) is None
    (tmp_path / ID_FILE).write_text("abcd1234\n")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert add_to_summary(arguments(tmp_path), tmp_path, VALUES) is None
    assert add_to_summary(Namespace(), tmp_path, VALUES) is None


def test_trouble_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / ID_FILE).write_text("abcd1234\n")
    (tmp_path / "w").write_text("a file")
    said = add_to_summary(arguments(tmp_path), tmp_path, VALUES)
    assert said is not None and "has not got the scores" in said and "/w cannot be written" in said
