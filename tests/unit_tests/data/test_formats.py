"""What a file holds is decided by its content: every format as public data sets come."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from trinity_megatron.data.corpus import (
    Document,
    ReadOptions,
    Skipped,
    find_files,
    read_documents,
)

TEXTS = [f'document {i}: ünïcode 日本 😀,\nanother "line"\t{"x" * (i % 50)}' for i in range(300)]
ROWS = [{"text": text, "timestamp": "2019-04-25", "url": "https://example.org"} for text in TEXTS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode("utf-8")
HALF = LINES.index(b"\n", len(LINES) // 2) - 17  # inside of a row


def read(*sources: Path, **options) -> tuple[list[str], dict[str, str]]:
    """Texts, and reasons by name."""
    files, skipped = find_files(sources, options=ReadOptions(**options))
    entries = list(read_documents(files, ReadOptions(**options)))
    left_out = [*skipped, *(entry for entry in entries if isinstance(entry, Skipped))]
    texts = [entry.text for entry in entries if isinstance(entry, Document)]
    return texts, {entry.name: entry.reason for entry in left_out}


def compress_by(codec: str) -> Callable[[bytes], bytes]:
    def run(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return run


def packed(data: bytes) -> bytes:
    """gzip without the time: the workers of a test session name their tests alike."""
    return gzip.compress(data, mtime=0)


zstd = compress_by("zstd")
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
    "lz4": compress_by("lz4"),
}


def write_csv(*, delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerows([["id", "text"], *([number, text] for number, text in enumerate(TEXTS))])
    return buffer.getvalue().encode(encoding)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4-train.00000-of-01024.json", LINES),
        ("rows.ndjson", LINES),
        ("rows.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES),
        ("rows.jsonl", LINES.decode("utf-8").encode("utf-16")),
        ("part-00000", LINES),
        ("rows.txt", LINES),
        ("array.json", json.dumps(ROWS).encode()),
        ("array.json", json.dumps(ROWS, indent=2).encode()),
        ("array.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent="\t").encode()),
        ("array.jsonl", json.dumps(ROWS, indent=2).encode()),
        ("objects.json", "\n".join(json.dumps(row, indent=4) for row in ROWS).encode()),
        ("objects.jsonl", "".join(json.dumps(row) for row in ROWS).encode()),
        ("rows.csv", write_csv()),
        ("rows.csv", write_csv(encoding="utf-8-sig")),
        ("excel.csv", write_csv(delimiter=";", encoding="utf-16")),
        ("rows.tsv", write_csv(delimiter="\t")),
        ("tabs.csv", write_csv(delimiter="\t")),
    ],
)
def test_rows_are_documents_whatever_the_file_is_called(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    assert read(tmp_path / name) == (TEXTS, {})
    assert read(tmp_path) == (TEXTS, {})


@pytest.mark.parametrize("suffix", list(COMPRESSIONS))
@pytest.mark.parametrize("parts", [(LINES,), (LINES[:HALF], LINES[HALF:])], ids=["one", "two"])
def test_compressed_rows_are_read_to_the_end_of_the_last_member(tmp_path, suffix, parts):
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(b"".join(map(COMPRESSIONS[suffix], parts)))

    assert read(path) == (TEXTS, {})
    renamed = path.rename(tmp_path / "rows.json.gz")  # the content says how
    assert read(renamed) == (TEXTS, {})


@pytest.mark.parametrize("suffix", list(COMPRESSIONS))
@pytest.mark.parametrize("missing", [1, 9, 500])
@pytest.mark.parametrize("before", [b"", LINES], ids=["first", "second"])
def test_a_compressed_file_that_is_cut_is_an_error(tmp_path, suffix, missing, before):
    compression = COMPRESSIONS[suffix]
    content = (compression(before) if before else b"") + compression(LINES)[:-missing]
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(content)

    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"rows.jsonl.{suffix} .*(?i:truncated)"):
            read(source)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])  # lz4 may have no checksum
def test_a_damaged_compressed_file_is_an_error(tmp_path, suffix):
    content = bytearray(COMPRESSIONS[suffix](LINES))
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    (tmp_path / f"rows.json.{suffix}").write_bytes(content)

    with pytest.raises(
        ValueError, match=rf"source .*rows.json.{suffix} (is|cannot be read)"
    ) as caught:
        read(tmp_path)
    assert "None" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl.xz", lzma.compress(LINES) + b"garbage " * 9, "format not supported"),
        ("rows.jsonl.gz", b"\x00\x01garbage", "not a .gz file, although its name says so"),
        ("rows.jsonl.zst", b"", "an empty .zst file"),
        ("rows.parquet", b"<html>404</html>", "not a .parquet file"),
        ("rows.arrow", bytes(64), "not a .arrow file"),
        ("rows.parquet.gz", packed(b"PAR1" + bytes(9)), "a parquet file inside of gzip"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.json.gz", packed(packed(packed(packed(b"x")))), "than 3"),
    ],
)
def test_data_that_is_not_what_its_name_says_is_an_error_in_a_folder_too(
    tmp_path, name, content, reason
):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "other.txt").write_text("text " * 1000)

    with pytest.raises(ValueError, match=f"{name} .*{reason}"):
        read(tmp_path)


def test_double_suffixes_and_compressed_text(tmp_path):
    (tmp_path / "a.jsonl.gz.zst").write_bytes(zstd(gzip.compress(LINES)))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("täxt\r\n".encode()))
    (tmp_path / "c.csv.bz2").write_bytes(bz2.compress(b"text\nlast\n"))
    (tmp_path / "d.jsonl.gz").write_bytes(b'{"text": "unpacked by a download"}\n')

    assert read(tmp_path) == ([*TEXTS, "täxt\r\n", "last", "unpacked by a download"], {})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Größe\r\n日本\ufeff".encode(encoding))

    assert read(tmp_path) == (["Größe\r\n日本\ufeff"], {})


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.string()),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array([text.encode() for text in TEXTS], pa.binary()),
        pa.array(TEXTS).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "stream"])
def test_tables_of_every_type_of_text(tmp_path, column, kind):
    path = tmp_path / ("rows.arrow" if kind == "stream" else f"rows.{kind}")
    table = pa.table({"id": range(300), "text": column})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=99, compression="zstd")
    elif kind == "stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    else:
        pyarrow.feather.write_feather(table, path, compression="zstd")

    assert read(path) == (TEXTS, {})
    assert read(path.rename(tmp_path / "nosuffix")) == (TEXTS, {})


def test_a_damaged_page_of_parquet_has_a_reason(tmp_path):
    path = tmp_path / "rows.parquet"
    for compression in ("snappy", "none"):  # without compression only a checksum shows it
        pq.write_table(
            pa.table({"text": TEXTS}),
            path,
            compression=compression,
            use_dictionary=False,
            write_page_checksum=compression == "none",
        )
        content = bytearray(path.read_bytes())
        third = len(content) // 3
        content[third : third + 100] = bytes(byte ^ 0x5A for byte in content[third : third + 100])
        path.write_bytes(content)

        with pytest.raises(
            ValueError, match=r"rows.parquet is not .*: .*(?i:corrupt|integrity)"
        ) as caught:
            read(path)
        assert "None" not in str(caught.value)


NESTED = [{"id": 1, "meta": {"body": {"text": text}, "lang": "en"}} for text in TEXTS]


def test_a_text_key_leads_into_objects_and_a_literal_one_wins(tmp_path):
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in NESTED))
    pq.write_table(pa.Table.from_pylist(NESTED), table)
    for path in (lines, table):
        assert read(path, text_key="meta.body.text") == (TEXTS, {})

    rows = [{"a.b": text, "a": {"b": "wrong"}} for text in TEXTS]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), table)
    for path in (lines, table):
        assert read(path, text_key="a.b") == (TEXTS, {})
    lines.write_text('{"a.b": {"c.d": "x"}}\n{"a": {"b": {"c": {"d": "y"}}}}\n{"a": null}\n')
    assert read(lines, text_key="a.b.c.d") == (["x", "y"], {"a.jsonl:3": "empty"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in NESTED).encode()),
        ("a.json", "".join(json.dumps(row) + "\n" for row in NESTED).encode()),
        ("a.json", json.dumps(NESTED, indent=1).encode()),
        ("a.json", json.dumps(NESTED[0]).encode()),
        ("a.json.gz", packed(json.dumps(NESTED[0], indent=1).encode())),
        ("a.csv", b"id,meta.body.text,meta.lang\n1,x,en\n"),
        ("a.parquet", None),
    ],
)
def test_an_unknown_key_is_answered_with_those_there_are(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        pq.write_table(pa.Table.from_pylist(NESTED), path)
    else:
        path.write_bytes(content)

    for source in (path, tmp_path):
        with pytest.raises(
            ValueError, match=rf"{name}.* 'text', only id, meta.body.text, meta.lang;.*--text-key"
        ):
            read(source)


def test_settings_among_code_are_text_and_beside_rows_are_left_out(tmp_path):
    (tmp_path / "main.py").write_text("print('code')\n" * 50)
    (tmp_path / "package.json").write_text('{"name": "x", "version": "1.0"}\n')
    (tmp_path / "tsconfig.json").write_text('{\n  // JSON with a comment\n  "a": 1}\n')
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "list.json").write_text("[1, 2]\n")
    (tmp_path / "template.txt").write_text("{} is an object, [1] is a list\n")
    texts, left_out = read(tmp_path)
    assert len(texts) == 6 and not left_out

    (tmp_path / "rows.jsonl").write_bytes(LINES)
    texts, left_out = read(tmp_path)
    assert len(texts) == 2 + 300
    assert {name.rpartition("/")[2] for name in left_out} == {
        "package.json",
        "tsconfig.json",
        "table.csv",
        "list.json",
    }
    assert all(reason.startswith("JSON or CSV without rows") for reason in left_out.values())
    assert len(read(tmp_path, plain_text=True)[0]) == 7  # each as the text it is


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n\n", "\n= Title =\n", "日本"])
@pytest.mark.parametrize("windows", [False, True])
def test_one_text_is_split_into_documents(tmp_path, separator, windows, monkeypatch):
    from trinity_megatron.data import streams

    monkeypatch.setattr(streams, "_CHUNK_BYTES", 61)  # separators lie across chunks
    texts = [text.replace("日本", "") for text in TEXTS]
    content = separator.join([*texts, "\n"]).encode()  # the last piece is only a line end
    if windows:
        content = content.replace(b"\n", b"\r\n")
        texts = [text.replace("\n", "\r\n") for text in texts]
    (tmp_path / "big.txt").write_bytes(content)
    (tmp_path / "rows.jsonl").write_text('{"text": "a<|endoftext|>b"}\n')

    assert read(tmp_path / "big.txt", split_on=separator) == (texts, {})
    assert read(tmp_path, split_on=separator)[0] == [*texts, "a<|endoftext|>b"]


def test_pieces_that_are_empty_or_bad_are_named(tmp_path):
    path = tmp_path / "big.txt"
    path.write_bytes(b"a" * 2**16 + b"##b##\xff##c\0##d")

    with pytest.raises(ValueError, match=r"document 3: binary|document 3: not UTF-8"):
        read(path, split_on="##")
    texts, left_out = read(path, split_on="##", skip_bad_rows=2)
    assert texts == ["a" * 2**16, "b", "d"]
    assert left_out["big.txt:3"].startswith("bad row: not UTF-8")
    assert left_out["big.txt:4"].startswith("bad row: binary")


def test_fields_of_csv_are_as_long_as_they_are(tmp_path):
    text = "many words\n" * 50_000  # 131072 characters are csv's own limit
    path = tmp_path / "a.csv"
    path.write_text(
        f'id,text\r\n1,"{text}"\r\n\r\n2,"quoted ""words"", more"\r\n3,\r\n', newline=""
    )

    texts, left_out = read(path)

    assert texts == [text, 'quoted "words", more']
    assert list(left_out.values()) == ["empty"]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "line 2: not a JSON row"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}', "line 2: .*in UTF-8"),
        ("a.json", b'{"text": "a"}\n{"txt": "x"}\n{"text": "b"}', "line 2: no field 'text', only"),
        ("a.json", b'[{"text": "a"}, {"text": 5}, {"text": "b"}]', "row 2: 'text' is int"),
        ("a.json", b'[{"text": "a"}, "x", {"text": "b"}]', "row 2: .* it is str"),
        ("a.json", b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]', "row 2: .* 0xff.*not UTF"),
        ("a.csv", b"text,id\na,1\nb\nb,2\n", "line 3: 1 fields, but the header has 2"),
        ("a.csv", b"text,id\na,1\nx,2,3\nb,2\n", "line 3: 3 fields, but the header has 2"),
        ("a.csv", "text,id\na,1\nö,2\nb,3".encode("latin-1"), "line 3: .*0xf6, which is not UTF-8"),
    ],
)
def test_bad_rows_are_errors_or_as_many_as_allowed_are_skipped(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=rf"{name}, {where}.*--skip-bad-rows 1 or more"):
        read(tmp_path)
    texts, left_out = read(tmp_path, skip_bad_rows=1)
    assert texts == ["a", "b"]
    assert [reason.partition(":")[0] for reason in left_out.values()] == ["bad row"]
    (tmp_path / f"0{name}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name}, {where}.*beyond the 1 that --skip-bad-rows"):
        read(tmp_path, skip_bad_rows=1)
    assert read(tmp_path, skip_bad_rows=2)[0] == ["a", "b"] * 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", json.dumps(ROWS).encode()[:-1], "the file ends inside of the array"),
        ("a.json", json.dumps(ROWS).encode()[:-9], "not JSON at row 300"),
        ("a.json", json.dumps(ROWS).encode() + b"[]", "something follows the end"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "where a comma should be"),
        ("a.json", b'[{"text": "a"},]', "a comma before the end"),
        ("a.json", json.dumps(ROWS[0], indent=1).encode() + b"{", "not JSON at row 2"),
        ("a.csv", b'text,id\n"a,1\nb,2\n', "not CSV up to line 3: unexpected end of data"),
        ("a.csv", b'text,id\n"a"b,1\n', "not CSV up to line 2"),
    ],
)
def test_a_file_whose_rows_cannot_be_told_apart_is_an_error(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=f"{name} is .*{reason}"):
        read(tmp_path, skip_bad_rows=1000)


def save_to_disk(folder: Path, shards: list[list[str]]) -> None:
    """What `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    schema = pa.schema({"text": pa.string()})
    for name, texts in zip(names, shards, strict=True):
        sink = pa.OSFile(str(folder / name), "wb")
        with sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.table({"text": texts}), max_chunksize=100)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text('{\n  "features": {"text": {"dtype": "string"}}\n}')


def test_a_saved_dataset_is_its_rows(tmp_path):
    folder = tmp_path / "saved"
    save_to_disk(folder / "a_train", [TEXTS[:150], TEXTS[150:250]])
    save_to_disk(folder / "b_test", [TEXTS[250:]])
    (folder / "dataset_dict.json").write_text('{"splits": ["a_train", "b_test"]}')
    cache = folder / "a_train" / "cache-0123456789abcdef.arrow"  # of Dataset.map
    cache.write_bytes((folder / "a_train" / "data-00000-of-00002.arrow").read_bytes())

    texts, left_out = read(folder)

    assert texts == TEXTS
    assert left_out.pop(f"saved/a_train/{cache.name}").startswith("not a file of the dataset")
    assert set(left_out.values()) == {"description of a dataset"} and len(left_out) == 5

    (folder / "a_train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"a_train lacks 1 parts .*state.json.*data-00001-of-0000"):
        read(folder)
    (folder / "dataset_dict.json").write_text('{"splits": ["a_train", "b_test", "c"]}')
    with pytest.raises(ValueError, match=r"saved lacks 1 parts .*dataset_dict.json names \(c\)"):
        read(folder)


@pytest.mark.parametrize("missing", [8, 20, 5000])
def test_a_dataset_that_is_cut_is_an_error(tmp_path, missing):
    save_to_disk(tmp_path / "saved", [TEXTS])
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-missing])

    with pytest.raises(ValueError, match="data-00000-of-00001.arrow is an Arrow stream .* cut off"):
        read(tmp_path / "saved")


@pytest.mark.parametrize(
    "options",
    [{"text_key": ""}, {"split_on": ""}, {"skip_bad_rows": -1}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} .*; pass"):
        ReadOptions(**options)


def test_options_without_effect_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text ## text")
    (tmp_path / "a.json").write_text('{"id": 1}')
    (tmp_path / "rows.jsonl").write_text('{"text": "a ## b"}')

    with pytest.raises(ValueError, match=r"'body': no source has rows .*a.json is .*only id;"):
        (tmp_path / "b.txt").write_text("more text than JSON")
        (tmp_path / "rows.jsonl").rename(tmp_path.parent / "rows.jsonl")
        read(tmp_path, text_key="body")
    with pytest.raises(ValueError, match=r"split_on '##': no source is a text file"):
        read(tmp_path.parent / "rows.jsonl", split_on="##")
    with pytest.raises(ValueError, match=r"split_on '#####' occurs in no text file"):
        read(tmp_path, split_on="#####")
    assert len(read(tmp_path, split_on="##")[0]) == 4
    (tmp_path / "a.txt").write_text("one document that ends##\n")
    assert "one document that ends" in read(tmp_path, split_on="##")[0]


def test_a_folder_that_spark_wrote_is_its_rows(tmp_path):
    folder = tmp_path / "rows.parquet"
    folder.mkdir()
    metadata: list[pq.FileMetaData] = []
    table = pa.table({"text": TEXTS})
    pq.write_to_dataset(table, folder, metadata_collector=metadata)
    pq.write_metadata(table.schema, folder / "_metadata", metadata_collector=metadata)
    (folder / "_SUCCESS").touch()

    texts, left_out = read(folder)

    assert texts == TEXTS
    assert left_out == {
        "rows.parquet/_SUCCESS": "empty",
        "rows.parquet/_metadata": "description of a dataset",
    }


def test_a_jsonl_file_with_a_hole_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n' + bytes(5000) + b'\n{"text": "b"}\n')

    with pytest.raises(ValueError, match="rows.jsonl, line 2: not a JSON row"):
        read(tmp_path)
    assert read(tmp_path, skip_bad_rows=1)[0] == ["a", "b"]


def test_files_are_closed(tmp_path):
    for name, compression in COMPRESSIONS.items():
        (tmp_path / f"a.jsonl.{name}").write_bytes(compression(LINES))
    (tmp_path / "b.jsonl").write_bytes(LINES.decode().encode("utf-16"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        read(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_document_beyond_memory_is_refused_by_name(tmp_path, monkeypatch):
    from trinity_megatron.data import rows, streams

    for module in (streams, rows):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 2**21)
    text = "word " * 2**20
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text('{"text": "' + text + '"}')
    (tmp_path / "a.json").write_text('[{"text": ""}, {"text": "' + text + '"}]')

    for name in ("a.txt", "a.jsonl", "a.json"):
        with pytest.raises(ValueError, match=rf"{name} is too large: .* 2 MiB.*--split-on"):
            read(tmp_path / name)
    assert len(read(tmp_path / "a.txt", split_on="d w")[0]) == 2**20
