"""Tokenizers that were trained elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.unit_tests.data.tokenizer_cases import TEXTS, VOCAB_SIZE
from trinity_megatron.data.given_tokenizer import copy_tokenizer, load_tokenizer
from trinity_megatron.data.tokenizer import (
    END_OF_TEXT,
    encode_documents,
)


@pytest.fixture
def model(saved, tmp_path):
    """A model's folder whose tokenizer may be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


@pytest.mark.parametrize("is_dict", [False, True])
def test_a_given_tokenizer_encodes_as_the_one_that_was_saved(tokenizer, model, is_dict):
    if is_dict:
        token = {"__type": "AddedToken", "content": END_OF_TEXT, "special": True}
        edit_json(model / "tokenizer_config.json", eos_token=token)

    given = load_tokenizer(model)

    assert given.eos_token == END_OF_TEXT
    assert given.vocab_size == VOCAB_SIZE
    expected = encode_documents(tokenizer, TEXTS)
    assert encode_documents(given.tokenizer, TEXTS, eos_token=given.eos_token) == expected


@pytest.mark.parametrize("is_special", [True, False])
def test_a_document_is_neither_framed_nor_cut_nor_filled(model, is_special):
    path = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    plain = Tokenizer.from_file(str(path))
    added = ["<|eos|>", "<|bos|>"]
    (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 701), ("<|eos|>", 700)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    tokenizer.save(str(path))
    edit_json(model / "tokenizer_config.json", eos_token="<|eos|>")
    texts = [*TEXTS, "ends <|eos|><|eos|> twice"]

    given = load_tokenizer(model)
    encoded = encode_documents(given.tokenizer, texts, eos_token=given.eos_token)

    assert given.vocab_size == VOCAB_SIZE + 2
    expected = encode_documents(plain, texts)  # ended by <|endoftext|>, id 0
    assert encoded == [[*ids[:-1], 700] for ids in expected]


def test_unused_ids_count_as_tokens(model):
    path = model / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["model"]["vocab"]["e"] = 70_000
    path.write_text(json.dumps(values), "utf-8")

    given = load_tokenizer(model)

    assert given.tokenizer.get_vocab_size() == VOCAB_SIZE
    assert given.vocab_size == 70_001


def test_the_files_of_a_tokenizer_are_copied_and_no_others(model, tmp_path):
    ours = ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt"]
    others = [
        *("config.json", "generation_config.json", "modeling_x.py", "README.md", "LICENSE"),
        *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.pt"),
        *("x.gguf", ".gitattributes"),
    ]
    for name in [*ours, *others]:
        (model / name).write_text(f"content of {name}")
    (model / "original").mkdir()
    snapshot = tmp_path / "snapshots" / "1a2b"  # the hub's cache
    snapshot.parent.mkdir()
    (tmp_path / "blobs").mkdir()
    model = model.rename(snapshot)
    blob = (model / "tokenizer.json").rename(tmp_path / "blobs" / "c3d4")
    (model / "tokenizer.json").symlink_to(blob)
    copy = tmp_path / "copy"

    copy_tokenizer(load_tokenizer(model), copy)

    names = sorted([*ours, "tokenizer.json", "tokenizer_config.json"])
    assert sorted(path.name for path in copy.iterdir()) == names
    assert not any(path.is_symlink() for path in copy.iterdir())
    for name in names:
        assert (copy / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_changes_is_noticed(model, tmp_path, name):
    given = load_tokenizer(model)
    if name == "tokenizer.json":
        (model / name).write_bytes((model / name).read_bytes() + b"\n")
    else:
        edit_json(model / name, eos_token="e")

    with pytest.raises(ValueError, match=f"tokenizer {model} changed while it was read"):
        copy_tokenizer(given, tmp_path / "copy")


def test_a_tokenizer_that_is_not_there_is_named(model):
    with pytest.raises(ValueError, match=r"nowhere is not an existing folder; pass --tokenizer"):
        load_tokenizer(model / "nowhere")
    with pytest.raises(ValueError, match=r"tokenizer.json is not an existing folder"):
        load_tokenizer(model / "tokenizer.json")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (model / name).unlink()
        with pytest.raises(ValueError, match=f"{model}: {name} cannot be read .*--tokenizer with"):
            load_tokenizer(model)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {}}'])
def test_a_tokenizer_that_does_not_load_is_named(model, content):
    (model / "tokenizer.json").write_bytes(content)

    with pytest.raises(ValueError, match=f"{model}: tokenizer.json cannot be loaded .*again"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a JSON object .*; copy or download it again"),
        (b"[]", "is not a JSON object"),
        (b'{"eos_token": "\xff"}', "is not a JSON object"),
        (b"{}", r"names no eos_token \(None\).*; add it"),
        (b'{"eos_token": null}', r"names no eos_token \(None\)"),
        (b'{"eos_token": {"special": true}}', r"names no eos_token \(None\)"),
        (b'{"eos_token": 2}', r"names no eos_token \(2\)"),
    ],
)
def test_an_end_of_text_that_is_not_named_is_refused(model, content, reason):
    (model / "tokenizer_config.json").write_bytes(content)

    with pytest.raises(ValueError, match=f"{model}: tokenizer_config.json {reason}"):
        load_tokenizer(model)


def test_an_end_of_text_without_an_id_of_its_own_is_refused(model):
    edit_json(model / "tokenizer_config.json", eos_token="</s>")
    with pytest.raises(ValueError, match="eos_token '</s>' .* is not in the vocabulary .*; set"):
        load_tokenizer(model)
    edit_json(model / "tokenizer_config.json", eos_token="e")  # any text has it
    with pytest.raises(ValueError, match="characters 'e' inside a text become the end-of-text"):
        load_tokenizer(model)
