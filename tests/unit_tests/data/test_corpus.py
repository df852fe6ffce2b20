"""Finding and reading the documents of a corpus."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trinity_megatron.data.corpus import (
    Document,
    Skipped,
    find_files,
    hash_file,
    is_unchanged,
    read_documents,
)


def read(*sources: Path, exclude: Path | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Texts and reasons for what was left out, by name."""
    files, skipped = find_files(sources, exclude=exclude)
    entries = list(read_documents(files))
    texts = {entry.name: entry.text for entry in entries if isinstance(entry, Document)}
    left_out = [entry for entry in entries if isinstance(entry, Skipped)]
    assert len(entries) == len(texts) + len(left_out)
    return texts, {entry.name: entry.reason for entry in [*skipped, *left_out]}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "b" / "deep").mkdir(parents=True)
    (root / "z.txt").write_text("last")
    (root / "a.md").write_text("first")
    (root / "b" / "deep" / "code.py").write_text("x = 1\n")
    return root


def test_a_folder_is_read_recursively_in_sorted_order(folder):
    texts, skipped = read(folder)

    assert list(texts.items()) == [
        ("texts/a.md", "first"),
        ("texts/b/deep/code.py", "x = 1\n"),
        ("texts/z.txt", "last"),
    ]
    assert not skipped


def test_names_and_order_depend_neither_on_the_place_nor_on_the_order_of_sources(folder, tmp_path):
    single = tmp_path / "m.txt"
    single.write_text("middle")
    copy = tmp_path / "elsewhere" / "texts"
    shutil.copytree(folder, copy)

    assert list(read(folder, single)[0].items()) == list(read(single, copy)[0].items())


@pytest.mark.parametrize(
    "text",
    ["a\ufeffmark inside", "one\r\ntwo\rthree", "no end of line", "   \n\t ", "日本語 😀 é"],
)
def test_a_text_is_read_without_any_change(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode("utf-8"))

    assert read(path)[0] == {"a.txt": text}


def test_every_row_of_a_jsonl_file_is_a_document(tmp_path):
    # U+2028 ends a line for str.splitlines, not in JSON Lines.
    texts = ["plain", "line\u2028separator\u0085inside", "two\nlines", "😀"]
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join([rows[0], "", *rows[1:]]) + "\n", encoding="utf-8")

    found, skipped = read(path)

    assert list(found.values()) == texts
    assert list(found) == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:5"]
    assert not skipped


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_every_row_of_a_parquet_file_is_a_document(tmp_path, kind):
    texts = [f"document {i} 😀" for i in range(2500)]
    path = tmp_path / "rows.parquet"
    table = pa.table({"url": ["u"] * 2500, "text": pa.array(texts, kind)})
    pq.write_table(table, path, row_group_size=999)

    found, skipped = read(path)

    assert list(found.values()) == texts
    assert not skipped


def test_empty_documents_are_counted_not_read(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "x"}\n')
    pq.write_table(pa.table({"text": ["", None, "y"]}), tmp_path / "rows.parquet")

    texts, skipped = read(tmp_path)

    assert sorted(texts.values()) == ["x", "y"]
    assert sorted(name.rpartition("/")[2] for name in skipped) == [
        "empty.txt",
        "rows.jsonl:1",
        "rows.jsonl:2",
        "rows.parquet:1",
        "rows.parquet:2",
    ]
    assert set(skipped.values()) == {"empty"}


@pytest.mark.parametrize(
    ("content", "reason"), [(b"GIF\0\x01", "NUL byte"), ("größe".encode("latin-1"), "not UTF-8")]
)
def test_binary_files_are_counted_in_a_folder_and_refused_by_name(folder, content, reason):
    path = folder / "image"
    path.write_bytes(content)

    texts, skipped = read(folder)
    assert len(texts) == 3
    assert list(skipped) == ["texts/image"]
    assert reason in skipped["texts/image"]

    with pytest.raises(ValueError, match=f"{path}.*{reason}.*convert it to UTF-8"):
        read(path)


def test_whatever_a_folder_holds_besides_is_accounted_for(folder, tmp_path):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]")
    (folder / ".hidden").write_text("secret")
    (folder / "out").mkdir()
    (folder / "out" / "manifest.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")  # opening it would wait for ever

    texts, skipped = read(folder, exclude=folder / "out")

    assert len(texts) == 3
    assert skipped == {
        "texts/.git/": "hidden folder",
        "texts/.hidden": "hidden file",
        "texts/out/": "the folder being written",
        "texts/linked/": "link to a folder",
        "texts/broken": "unreadable: No such file or directory",
        "texts/pipe": "not a regular file",
    }


def test_sources_that_cannot_be_used_are_named(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=f"{empty} holds no readable file"):
        find_files([empty])
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="z.txt is named twice"):
        find_files([folder, folder / "z.txt"])
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        find_files([Path(os.devnull)])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "not a JSON row"),
        (b'{"text": "\xff"}', "not a JSON row in UTF-8"),
        (b'{"content": "x"}', "no field 'text'"),
        (b'["text"]', "no field 'text'"),
        (b'{"text": 5}', "is int, not a string"),
        (rb'{"text": "\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")

    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"rows\.jsonl, (line|row) 2: .*{reason}"):
            read(source)


def test_a_bad_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), path)
    with pytest.raises(ValueError, match="rows.parquet has no column 'text', only content, url"):
        read(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match="rows.parquet, row 1: 'text' is int"):
        read(path)
    path.write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match="rows.parquet is not a parquet file"):
        read(path)


def test_without_sources_the_standard_library_is_the_corpus():
    texts, skipped = read()

    assert len(texts) > 300
    assert sum(map(len, texts.values())) > 5_000_000
    assert list(texts) == sorted(texts)
    assert all(name.startswith("stdlib/") and name.endswith(".py") for name in texts)
    assert not any("test" in name.split("/")[1:-1] or "site-packages" in name for name in texts)
    assert texts["stdlib/json/decoder.py"] == Path(json.decoder.__file__).read_text("utf-8")
    assert set(skipped.values()) == {"empty"}


def test_a_file_is_known_by_its_content_and_its_change_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 300_000)
    [file], _ = find_files([path])

    assert hash_file(path) == hashlib.sha256(b"x" * 300_000).hexdigest()
    assert is_unchanged(file)
    os.utime(path, ns=(file.modified_ns, file.modified_ns + 1))
    assert not is_unchanged(file)
    path.unlink()
    assert not is_unchanged(file)
    with pytest.raises(ValueError, match="a.txt cannot be read"):
        hash_file(path)
