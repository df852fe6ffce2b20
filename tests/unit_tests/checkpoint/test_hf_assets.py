"""A run keeps its tokenizer beside its checkpoints."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from trinity_megatron.checkpoint.hf_assets import (
    ASSETS_NAME,
    check_tokenizer,
    find_tokenizer,
    keep_tokenizer,
    read_stamp,
)
from trinity_megatron.data.corpus import hash_file


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text('{"model": 1}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text("{}")  # of a model that lies beside it
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    return folder


def of_run(folder: Path | str) -> Namespace:
    return Namespace(tokenizer_model=str(folder), tokenizer_type="HuggingFaceTokenizer")


def test_it_is_found_when_the_run_has_moved_and_the_data_are_gone(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "run" / "checkpoints"
    keep_tokenizer(tokenizer, save)
    step = save / "iter_0000001"
    step.mkdir()
    fingerprint = hash_file(tokenizer / "tokenizer.json")
    assert sorted(path.name for path in save.iterdir()) == [
        "iter_0000001",
        "tokenizer",
        "tokenizer.sha256",
    ]
    shutil.rmtree(tokenizer.parent)
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run", moved)
    monkeypatch.chdir(moved / "checkpoints")
    for checkpoint in (moved / "checkpoints" / "iter_0000001", Path("iter_0000001")):
        found = find_tokenizer(checkpoint, of_run("data/tokenizer"))
        assert found is not None and hash_file(found / "tokenizer.json") == fingerprint
        assert sorted(path.name for path in found.iterdir()) == [
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        check_tokenizer(checkpoint, found)


@pytest.mark.parametrize("damage", ["half", "spoilt", "empty", "none"])
def test_a_second_start_mends_the_copy(damage: str, tokenizer: Path, tmp_path: Path) -> None:
    keep_tokenizer(tokenizer, tmp_path)
    copy = tmp_path / "tokenizer"
    if damage == "half":  # killed while it was written
        copy.rename(tmp_path / "tokenizer.incomplete")
    elif damage == "spoilt":
        (copy / "tokenizer.json").write_text("{")
    elif damage == "empty":
        (copy / "tokenizer.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in copy.iterdir()} if copy.exists() else {}
    keep_tokenizer(tokenizer, tmp_path)
    assert (copy / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert not (tmp_path / "tokenizer.incomplete").exists()
    if damage == "none":
        assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == times


def test_nothing_is_copied_beside_the_assets_of_hugging_face(
    tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer, tmp_path / ASSETS_NAME)
    keep_tokenizer(tokenizer, tmp_path)
    assert not (tmp_path / "tokenizer").exists()
    assert find_tokenizer(tmp_path / "iter_0000001", of_run("gone")) == tmp_path / ASSETS_NAME
    assert read_stamp(tmp_path) == hash_file(tokenizer / "tokenizer.json")
    (tmp_path / ASSETS_NAME / "tokenizer.json").unlink()  # weights without a tokenizer
    keep_tokenizer(tokenizer, tmp_path)
    assert find_tokenizer(tmp_path / "iter_0000001", of_run("gone")) == tmp_path / "tokenizer"


def test_another_chat_template_goes_before_that_of_hugging_face(
    tokenizer: Path, tmp_path: Path
) -> None:
    """A run that teaches to chat: the vocabulary is the same, the template is not."""
    shutil.copytree(tokenizer, tmp_path / ASSETS_NAME)
    (tmp_path / ASSETS_NAME / "chat_template.jinja").write_text("{{ 1 }}")
    (tokenizer / "chat_template.jinja").write_text("{{ 2 }}")
    keep_tokenizer(tokenizer, tmp_path)
    found = find_tokenizer(tmp_path / "iter_0000001", of_run("gone"))
    assert found is not None and (found / "chat_template.jinja").read_text() == "{{ 2 }}"
    (tokenizer / "chat_template.jinja").write_text("{{ 3 }}")
    keep_tokenizer(tokenizer, tmp_path)
    assert (found / "chat_template.jinja").read_text() == "{{ 3 }}"


def test_another_end_of_text_goes_before_that_of_hugging_face(
    tokenizer: Path, tmp_path: Path
) -> None:
    """Conversations end with the token that ends a turn."""
    shutil.copytree(tokenizer, tmp_path / ASSETS_NAME)
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    keep_tokenizer(tokenizer, tmp_path)
    found = find_tokenizer(tmp_path / "iter_0000001", of_run("gone"))
    assert found == tmp_path / "tokenizer"
    assert "im_end" in (found / "tokenizer_config.json").read_text()


def test_a_run_of_an_earlier_release(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "run" / "checkpoints" / "iter_0000001"
    assert find_tokenizer(step, of_run(tokenizer)) == tokenizer
    monkeypatch.chdir(tmp_path)
    assert find_tokenizer(step, of_run("data/tokenizer")) == Path("data/tokenizer")
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="data/tokenizer, is not there. Remedy: --tokenizer"):
        find_tokenizer(step, of_run("data/tokenizer"))
    assert find_tokenizer(step, Namespace(tokenizer_type="GPT2BPETokenizer")) is None


def test_another_tokenizer_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    keep_tokenizer(tokenizer, tmp_path)
    (tokenizer / "tokenizer.json").write_text('{"model": 2}')
    for flag in ("--tokenizer", "--tokenizer-model"):
        with pytest.raises(ValueError, match=f"trained with the tokenizer .*Remedy: {flag} DIR"):
            check_tokenizer(tmp_path, tokenizer, flag=flag)
