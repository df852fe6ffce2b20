"""JSON that would take the machine is refused before it is parsed."""

from pathlib import Path

import pytest

from trinity_megatron.untrusted.json_file import MAX_BYTES, parse_json, read_json

HOSTILE = {
    "nested": (b"[" * 100_000, "nested too deeply"),
    "nested objects": (b'{"a":' * 100_000, "nested too deeply"),
    "nested within what Python reads": (b"[" * 300 + b"]" * 300, "nested too deeply"),
    "nested objects within that": (b'{"a":' * 300 + b"1" + b"}" * 300, "nested too deeply"),
    "a number": (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "cut": (b'{"a": ', "Expecting value"),
    "empty lists": (b"[" + b"[]," * (MAX_BYTES // 3 + 1) + b"[]]", "MiB of JSON hold"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(name: str) -> None:
    content, problem = HOSTILE[name]
    with pytest.raises(ValueError, match=problem):
        parse_json(content)


def test_a_file_of_any_length_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # without blocks on the disk
    with pytest.raises(ValueError, match="more than 64 MiB"):
        read_json(path)


def test_what_is_not_nested() -> None:
    assert parse_json(b"[" * 150 + b"]" * 150)
    assert parse_json(b'["' + b"[" * 1000 + b'"]') == ["[" * 1000]
    assert len(parse_json(b"[" + b"[[]]," * 999 + b"{}]")) == 1000


def test_a_large_text_is_no_bomb() -> None:
    text = b"word " * (MAX_BYTES // 5 + 1)
    assert len(parse_json(b'{"text": "' + text + b'"}')["text"]) == len(text)
