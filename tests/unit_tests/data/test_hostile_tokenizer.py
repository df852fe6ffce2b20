"""Tokenizers that take the machine, bring code along, or are no tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trinity_megatron.data.chat.template import load_chat_template
from trinity_megatron.data.given_tokenizer import load_tokenizer, read_vocab_size
from trinity_megatron.data.tokenizer import (
    CONFIG_NAME,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    chatml_template,
    encode_documents,
    save_tokenizer,
    train_tokenizer,
)
from trinity_megatron.data.tokenizer_file import load_transformers_tokenizer
from trinity_megatron.errors import UserError

Fields = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(train_tokenizer(["hello world " * 50] * 20, vocab_size=262), tmp_path)
    return tmp_path


def change(path: Path, work: Callable[[Fields], object]) -> None:
    fields = json.loads(path.read_text())
    work(fields)
    path.write_text(json.dumps(fields))


def replaces(**fields: Any) -> Callable[[Fields], object]:
    return lambda whole: whole.update(fields)


def normalizer(content: str, times: int = 1) -> Fields:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [one] * times}


TOKENIZERS: dict[str, tuple[Callable[[Fields], object], str]] = {
    "a huge id": (lambda f: f["model"]["vocab"].update(zzz=2**32 - 1), "highest id"),
    "a long replacement": (replaces(normalizer=normalizer("a" * 10**6)), "as long"),
    "replacements": (replaces(normalizer=normalizer("a" * 10, 12)), "as long"),
    "a damaged table": (
        replaces(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "charsmap",
    ),
    "a damaged pattern": (
        replaces(
            pre_tokenizer={
                **{"type": "Split", "pattern": {"Regex": "(("}},
                **{"behavior": "Isolated", "invert": False},
            }
        ),
        "pattern",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_tokenizer(folder: Path, name: str) -> None:
    work, problem = TOKENIZERS[name]
    change(folder / TOKENIZER_NAME, work)
    for load in (load_tokenizer, read_vocab_size, load_transformers_tokenizer):
        with pytest.raises(UserError, match=problem) as error:
            load(folder)
        assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", [TOKENIZER_NAME, CONFIG_NAME])
def test_nested_files(folder: Path, name: str) -> None:
    (folder / name).write_text('{"a":' * 100_000)
    for load in (load_tokenizer, load_transformers_tokenizer):
        with pytest.raises(UserError, match="nested too deeply"):
            load(folder)


def test_an_id_that_only_transformers_adds(folder: Path) -> None:
    added = {"999999999999": {"content": "x"}}
    change(folder / CONFIG_NAME, replaces(added_tokens_decoder=added))
    with pytest.raises(UserError, match="highest id"):
        read_vocab_size(folder)


def test_a_pattern_that_takes_for_ever(folder: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}}
    split = {**pattern, "behavior": "Isolated", "invert": False}
    change(folder / TOKENIZER_NAME, replaces(pre_tokenizer=split))
    tokenizer = load_tokenizer(folder).tokenizer
    with pytest.raises(UserError, match="retry-limit"):
        encode_documents(tokenizer, ["a" * 40 + "!"])


def test_code_in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "program.py").write_text("import os\nos.mkdir('made')\nclass Mine: ...\n")
    change(folder / CONFIG_NAME, replaces(auto_map={"AutoTokenizer": ["program.Mine", None]}))
    with pytest.raises(UserError, match="auto_map of tokenizer_config.json names code"):
        load_transformers_tokenizer(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "afmoe", "auto_map": {"AutoConfig": "program.Mine"}})
    )
    change(folder / CONFIG_NAME, lambda fields: fields.pop("auto_map"))
    assert len(load_transformers_tokenizer(folder)) == 262
    assert not (folder / "made").exists()


def test_paths_in_its_config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "tokenizer.json"
    other.write_text("{}")
    change(folder / CONFIG_NAME, replaces(tokenizer_file=str(other), vocab_file=str(other)))
    assert len(load_transformers_tokenizer(folder)) == 262


TEMPLATES = {
    "loops": (
        "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2,
        "2 s",
    ),
    "a power": ("{{ 10 ** (10 ** 9) }}", "2 s"),
    "a long text": ("{% set a = 'a' * 10 ** 10 %}", "MiB of memory"),
    "a wide field": ("{{ '%9999999999d' % 1 }}", "MiB of memory"),
    "a long range": ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "attributes of what it gets": ("{{ messages.append.__self__.__class__ }}", "unsafe"),
    "attributes of a function": ("{{ lipsum.__globals__.os.getcwd() }}", "unsafe"),
    "attributes in a format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "a file": ("{% include '/etc/hostname' %}", "no loader"),
    "a change of the messages": ("{% set _ = messages.append(1) %}", "unsafe"),
    "arithmetic": ("{{ 1 / 0 }}", "division by zero"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_hostile_template(folder: Path, name: str) -> None:
    text, problem = TEMPLATES[name]
    template = folder / TEMPLATE_NAME
    template.write_text(text + chatml_template())
    with pytest.raises(UserError, match=problem):
        load_chat_template(folder)
    given = folder / "given.jinja"
    template.rename(given)
    if "memory" not in problem and problem != "2 s":  # tried in the same way
        with pytest.raises(UserError, match=problem):
            load_chat_template(folder, str(given))
