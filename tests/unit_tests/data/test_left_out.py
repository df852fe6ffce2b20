"""What is left out is counted, and refused if it may have been much of the corpus."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from trinity_megatron.data.corpus import ReadOptions, Skipped, find_files, read_documents
from trinity_megatron.data.left_out import LeftOut, check_formats

TEXT = "text " * 2000


def check(source: Path, max_share: float = 0.1) -> LeftOut:
    files, skipped = find_files([source])
    check_formats(skipped, files, max_share)
    entries = [e for e in read_documents(files, ReadOptions()) if isinstance(e, Skipped)]
    left_out = LeftOut([*skipped, *entries])
    left_out.check(files, max_share)
    return left_out


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mixed"
    root.mkdir()
    (root / "main.py").write_text(TEXT)
    return root


def zip_of(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", text)
    return buffer.getvalue()


def tar_of(text: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def noise(size: int) -> str:
    import random

    return "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=size))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("latin.txt", ("größe " * 2000).encode("latin-1"), "not UTF-8 text"),
        ("late.txt", b"a" * 2**17 + b"\xff", "not UTF-8 text"),
        ("nul.txt", b"a" * 2**17 + b"\0", "binary"),
        ("windows.txt", TEXT.encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        ("part1.zip", zip_of(TEXT), "a zip archive"),
        ("part1.tar.gz", tar_of(noise(20_000)), "a tar archive"),
        ("hole.json", b'[{"text": "a"},' + bytes(9000), "binary: holds a NUL byte"),
        ("paper.pdf", b"%PDF-1.7\n" + b"x" * 9000, "a PDF document"),
        ("rows.orc", b"ORC" + bytes(9000), "an ORC file"),
        ("rows.db", b"SQLite format 3\0" + bytes(9000), "an SQLite database"),
        ("rows.jsonl.br", b"\xff\x8b\x00" * 3000, "a .br file"),
    ],
)
def test_much_that_could_be_text_is_refused_with_its_name(folder, name, content, reason):
    (folder / name).write_bytes(content)

    with pytest.raises(ValueError, match=rf"1 files .*mixed/{name}: .*{reason}.*--max-left-out 1"):
        check(folder)
    assert [entry.name for entry in check(folder, 1.0).entries()] == [f"mixed/{name}"]


def test_little_of_it_is_counted_only(folder, caplog):
    (folder / "a.txt").write_bytes("ü".encode("latin-1") * 300)
    (folder / "b.txt").write_bytes("ü".encode("latin-1") * 300)

    check(folder).report()

    assert caplog.messages == ["left out 2: not UTF-8 text (first: mixed/a.txt)"]
    with pytest.raises(ValueError, match=r"2 files with 600 bytes, 6% of what could be text"):
        check(folder, 0.05)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("picture.png", b"\x89PNG\r\n\x1a\n\0" * 9000),
        ("weights.pt", zip_of(TEXT * 9)),
        ("library.so", b"\x7fELF\2\1\1\0" * 9000),
        ("sound.mp3", b"\xff\xfb\x90\0" * 9000),
        ("mark.bin", b"\xff\xfe\x00\xd8\x00\x00" * 9000),
        ("erased.bin", b"\xff" * 4000 + b"\0"),
        (".git/objects/pack.txt", b"hidden\xff" * 9000),
        ("__pycache__/main.pyc", b"\xff\0" * 9000),
        ("empty.py", b""),
    ],
)
def test_a_folder_of_code_may_hold_any_number_of_binary_files(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)

    assert len(check(folder, 0.0).entries()) == 1


def test_rows_are_one_entry_for_a_file_and_a_reason(tmp_path, caplog):
    rows = [{"text": text} for text in ["a", "", None, "b", "", 5, 6]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files, _ = find_files([path])
    entries = read_documents(files, ReadOptions(skip_bad_rows=2))

    left_out = LeftOut(entry for entry in entries if isinstance(entry, Skipped))
    left_out.check(files, 0.0)
    left_out.report()

    assert left_out.entries() == (
        Skipped("rows.jsonl:2 and 2 further rows", "empty"),
        Skipped("rows.jsonl:6 and 1 further rows", "bad row"),
    )
    assert caplog.messages == [
        "left out 3: empty rows (first: rows.jsonl:2)",
        "left out 2: bad row (first: rows.jsonl:6)",
    ]
