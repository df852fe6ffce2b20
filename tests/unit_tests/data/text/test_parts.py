"""Every row is in one part, whatever the format; what is wrong is named."""

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from tests.unit_tests.data.text.conftest import as_lines, make_texts
from trinity_megatron.data.address import StoredAt
from trinity_megatron.data.corpus import ReadOptions
from trinity_megatron.data.text.corpus_reader import CorpusReader
from trinity_megatron.data.text.parts import Parts, Row
from trinity_megatron.data.text.text_corpus import TextCorpus, find_text
from trinity_megatron.errors import UserError

TEXTS = make_texts(60, 4000, 1)
# One of them spans several parts, and its neighbours are empty or follow Windows line ends.
TEXTS[7] = "long " * 60_000


def compressed(content: bytes, name: str) -> bytes:
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, name) as stream:
        stream.write(content)
    return target.getvalue().to_pybytes()


def as_table(texts: list[Any], group: int) -> bytes:
    target = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, target, row_group_size=group)
    return target.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: as_lines(TEXTS),
    "windows.jsonl": lambda: as_lines(TEXTS).replace(b"\n", b"\r\n"),
    "mark.jsonl": lambda: b"\xef\xbb\xbf" + as_lines(TEXTS),
    "no_end.jsonl": lambda: as_lines(TEXTS).rstrip(),
    "a.jsonl.gz": lambda: gzip.compress(as_lines(TEXTS)),
    "a.jsonl.zst": lambda: compressed(as_lines(TEXTS), "zstd"),
    "array.json": lambda: json.dumps([{"text": text} for text in TEXTS]).encode(),
    "small_groups.parquet": lambda: as_table(TEXTS, 7),
    "one_group.parquet": lambda: as_table(TEXTS, 1000),
    "plain.txt": lambda: TEXTS[3].encode(),
    "cut.txt": lambda: "<end>".join(TEXTS).encode(),
}


def find(path: Path | StoredAt, **options: Any) -> TextCorpus:
    return find_text(path, name="web", key="corpora.web", options=ReadOptions(**options))


def everything(row: int) -> bool:
    return True


def read_all(corpus: TextCorpus, streams: int) -> list[Row]:
    parts = Parts(corpus, streams)
    return [row for part in range(len(parts)) for row in parts.read(part, everything)]


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_the_parts_are_the_file(tmp_path: Path, name: str, streams: int) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    corpus = find(tmp_path / name, **({"split_on": "<end>"} if name == "cut.txt" else {}))
    parts = Parts(corpus, streams)
    rows = [list(parts.read(part, everything)) for part in range(len(parts))]
    texts = [text for part in rows for _, text in part if text]
    expected = [TEXTS[3]] if name == "plain.txt" else TEXTS
    assert sorted(texts) == sorted(expected)
    for part, found in enumerate(rows):
        assert [number for number, _ in found] == list(range(len(found)))
        assert list(parts.read(part, lambda row: row % 3 == 1)) == found[1::3]
    is_ranged = name in ("a.jsonl", "windows.jsonl", "no_end.jsonl", "small_groups.parquet")
    if is_ranged:
        assert texts == TEXTS and len(parts) >= 3
    elif name != "plain.txt":
        assert len(parts) >= streams


def test_a_reader_goes_on_and_reads_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(TEXTS))
    parts = Parts(find(tmp_path), 2)
    reader = CorpusReader(parts, seed=1, stream=1, num_streams=2, is_shuffled=True)
    read = dict(reader.next() for _ in range(70))
    assert list(read) == sorted(read) and reader.epoch_of(max(read)) > 1
    other = CorpusReader(parts, seed=1, stream=1, num_streams=2, is_shuffled=True)
    other.seek(reader.position)
    assert other.next() == reader.next()
    chosen = sorted(read)[3::9]
    assert other.fetch(chosen) == {number: read[number] for number in chosen}


def test_an_address(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for name in ("web/a.jsonl", "web/b.jsonl.gz", "web/.hidden", "web/sub/c.parquet"):
        content = {"a": FILES["a.jsonl"], "b": FILES["a.jsonl.gz"], "c": FILES["one_group.parquet"]}
        made = content.get(Path(name).name[0])
        system.pipe(f"/trinity/{name}", made() if made else b"\0\1")
        if made:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(made())
    there, here = find(StoredAt("memory://trinity/web")), find(tmp_path / "web")
    names = ["web/a.jsonl", "web/b.jsonl.gz", "web/sub/c.parquet"]
    assert [file.source.name for file in there.files] == names
    assert [file.source.name for file in here.files] == names
    parts = Parts(there, 2), Parts(here, 2)
    assert len(parts[0]) == len(parts[1])
    for part in range(len(parts[0])):
        rows = [list(each.read(part, everything)) for each in parts]
        assert rows[0] == rows[1]
    with pytest.raises(FileNotFoundError, match="memory://trinity/none: nothing is there"):
        find(StoredAt("memory://trinity/none"))
    with pytest.raises(UserError, match=r"nowhere://x.*Remedy: a protocol"):
        find(StoredAt("nowhere://x"))


ROWS = as_lines(["one", "two"])
EARLY: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("a.jsonl", b"", ("holds no text", "empty")),
    "no field": ("a.jsonl", b'{"body": "x"}\n{"body": "y"}', ("line 1", "'text'", "body")),
    "no column": ("a.parquet", as_table(["x"], 1).replace(b"text", b"body"), ("a.parquet",)),
    "cut table": ("a.parquet", as_table(["x"] * 9, 1)[:-50], ("not a parquet file",)),
    "no table": ("a.parquet", ROWS, ("not a .parquet file",)),
    "no gzip": ("a.jsonl.gz", b"\1\2\0\3", ("not a .gz file",)),
    "pictures": ("a.png", b"\x89PNG\0\0", ("holds no text",)),
    "archive": ("a.zip", b"PK\3\4" + ROWS, ("a.zip", "zip archive")),
    "numbers": ("a.parquet", as_table([1, 2], 9), ("row 1", "int, not a string")),
    "lists": ("a.parquet", as_table([["x"], ["y"]], 9), ("row 1", "list, not a string")),
    "a first row": ("a.jsonl.gz", gzip.compress(b'{"text": 5}\n' + ROWS), ("line 1", "int")),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1", ("git lfs pull",)),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_is_named_before_a_run(tmp_path: Path, case: str) -> None:
    name, content, expected = EARLY[case]
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        find(tmp_path / "web")
    for words in ("corpora.web", *expected):
        assert words in str(error.value)


MORE = as_lines([f"more {number}" for number in range(3000)])
LATE: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(MORE * 20)[:-900],
        ("beyond line", "Remedy: put the whole"),
    ),
    "cut line": ("a.jsonl", MORE[:-9], ("line 5999", "not a JSON row")),
    "no JSON": ("a.jsonl", MORE + b"{no\n" + ROWS, ("line 6000", "not a JSON row")),
    "no field": ("a.jsonl", MORE + b'{"body": 1}', ("line 6000", "no field 'text', only body")),
    "a list": ("a.jsonl", MORE + b'{"text": ["x"]}', ("line 6000", "is list, not a string")),
    "a number": ("a.jsonl.gz", gzip.compress(ROWS + b'{"text": 5}'), ("line 4", "int")),
    "half a pair": ("a.jsonl", ROWS + b'{"text": "\\ud800"}', ("line 4", "surrogate pair")),
    "not UTF-8": ("a.jsonl", ROWS + b'{"text": "\xff"}', ("line 4", "utf-8")),
    "NUL bytes": ("a.txt", b"text" * 20_000 + b"\0", ("NUL byte",)),
}


@pytest.mark.parametrize("case", LATE)
def test_what_is_named_at_its_row(tmp_path: Path, case: str) -> None:
    name, content, expected = LATE[case]
    path = tmp_path / name
    path.write_bytes(content)
    corpus = find(tmp_path)
    with pytest.raises(UserError) as error:
        read_all(corpus, 2)
    for words in ("corpora.web", str(path), "Remedy", *expected):
        assert words in str(error.value)
    if case == "cut gzip":
        return
    lenient = find_text(tmp_path, name="web", key="k", options=ReadOptions(), skips_bad_rows=True)
    parts = Parts(lenient, 2)
    for part in range(len(parts)):
        assert all(isinstance(text, str) for _, text in parts.read(part, everything))
    [notice] = parts.take_notices()
    assert notice.startswith(f"left out: k: {path}") and not parts.take_notices()


def test_other_content_is_known(tmp_path: Path) -> None:
    path = tmp_path / "web/a.jsonl"
    path.parent.mkdir()
    path.write_bytes(MORE * 10)
    known = find(path.parent)
    path.rename(tmp_path / "web/moved.jsonl")
    assert find(path.parent).content != known.content  # the order goes by the names
    (tmp_path / "web/moved.jsonl").rename(path)
    (tmp_path / "web").rename(tmp_path / "elsewhere")
    assert find(tmp_path / "elsewhere").content == known.content
    assert replace(known, options=ReadOptions(text_key="id")).content != known.content
    changed = MORE * 10
    (tmp_path / "elsewhere/a.jsonl").write_bytes(changed[:-4] + b"x" + changed[-3:])
    assert find(tmp_path / "elsewhere").content != known.content


def test_few_rows_may_be_left_out(tmp_path: Path) -> None:
    """The first row has the field, and most others have another one."""
    (tmp_path / "a.jsonl").write_bytes(ROWS + b'{"content": "x"}\n' * 999)
    corpus = find_text(tmp_path, name="web", key="k", options=ReadOptions(), skips_bad_rows=True)
    parts = Parts(corpus, 1)
    with pytest.raises(UserError, match="101 of 103 rows hold no text, more than 10%. Remedy: te"):
        for part in range(len(parts)):
            list(parts.read(part, everything))
    notices = parts.take_notices()
    assert len(notices) == 11 and "100 rows so far" in notices[-1]


def test_a_separator_that_occurs_nowhere(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one<end>two")
    with pytest.raises(UserError, match=r"'<emd>' occurs in no text file; the first is .*a.txt"):
        find(tmp_path, split_on="<emd>")
    assert len(find(tmp_path, split_on="<end>").files) == 2


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    """As in a cache of downloads that was emptied."""
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    for number in range(9):
        (tmp_path / f"b{number}.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="9 files, 90% of them, would be left out; the first, "):
        find(tmp_path)
