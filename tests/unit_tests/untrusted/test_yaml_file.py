"""YAML runs nothing, and repeats nothing without end."""

from pathlib import Path

import pytest

from trinity_megatron.untrusted.yaml_file import read_yaml


def laughs(levels: int) -> str:
    """Each list holds the one before ten times."""
    lines = ["a0: &a0 [" + "ha, " * 10 + "]"]
    lines += [f"a{n}: &a{n} [" + f"*a{n - 1}, " * 10 + "]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    """Each mapping is merged from the one before, ten times."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [" + f"*a{n - 1}, " * 10 + "]}" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "a call": ("a: !!python/object/apply:os.mkdir [made]", "constructor for the tag"),
    "a module": ("a: !!python/module:os", "constructor for the tag"),
    "a tag of another program": ("a: !function os.mkdir", "constructor for the tag"),
    "laughs": (laughs(10), "aliases repeat"),
    "merged laughs": (merges(10), "aliases repeat"),
    "itself": ("a: &a [*a]", "contains itself"),
    "itself as a key": ("&a {*a : 1}", "contains itself"),
    "nested lists": ("[" * 100_000, "nesting|recursion"),
    "nested blocks": ("\n".join(" " * n + "a:" for n in range(3000)), "nesting|recursion"),
    "a list as a key": ("? [a]\n: 1", "unhashable"),
    "a key twice": ("a: 1\na: 2", "given twice"),
    "a number": ("a: " + "9" * 5000, "4300 digits"),
    "a date": ("a: 2026-99-99", "month"),
    "no UTF-8": (b"a: \xff", "utf-8"),
    "a control character": (b"a: \x01", "unacceptable|not allowed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    text, problem = HOSTILE[name]
    path = tmp_path / "mix.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=problem):
        read_yaml(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mix.yaml"]


def test_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\n" + laughs(4))
    found = read_yaml(path)
    assert found["b"] == {"x": 1, "y": 2} and len(found["a3"]) == 10


def test_a_file_of_any_length_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="more than 16 MiB"):
        read_yaml(path)
