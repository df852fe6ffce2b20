"""Data that unpack to far more than their files, lie about their size, or name other files."""

import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from trinity_megatron.data.corpus import ReadOptions, find_files, read_documents
from trinity_megatron.data.mixture.open_corpora import read_dataset_head
from trinity_megatron.data.tables import read_parquet
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.trial import try_apart

MIB = 2**20


def read(path: Path, key: str = "text") -> list[object]:
    options = ReadOptions(text_key=key)
    files, _ = find_files([path], options=options)
    return list(read_documents(files, options, set()))


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstd,
    "xz": lambda content: lzma.compress(content, preset=0),
    "gz.gz": lambda content: gzip.compress(gzip.compress(content)),
}


@pytest.mark.parametrize("kind", PACK)
def test_a_packed_text_is_cut_off_at_the_size_of_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from trinity_megatron.data import rows, streams

    for module in (streams, rows):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 4 * MIB)
    path = tmp_path / f"a.txt.{kind}"
    path.write_bytes(PACK[kind](b"a" * (96 * MIB)))
    assert path.stat().st_size < MIB
    with pytest.raises(UserError, match="is too large"):
        read(path)
    assert try_apart(lambda: read(path), seconds=30, num_bytes=64 * MIB) is None


def test_packed_too_often(tmp_path: Path) -> None:
    content = b"a"
    for _ in range(4):
        content = gzip.compress(content)
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(UserError, match="compressed more than 3 times"):
        read(tmp_path / "a.txt.gz")


def test_a_table_that_repeats_a_long_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pa.DictionaryArray.from_arrays(
        pa.array([0] * 1024, pa.int32()), pa.array(["a" * (4 * MIB)])
    )
    table = pa.table({"text": text})
    pq.write_table(
        table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**30
    )
    assert path.stat().st_size < 2**12  # for 4 GiB
    before = pa.total_allocated_bytes()
    for number, row in zip(range(20), read_parquet(path, "text"), strict=False):
        assert len(row[2]) == 4 * MIB and row[1] == number + 1
        assert pa.total_allocated_bytes() - before < 256 * MIB


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"text": ' * 100_000,
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": {"text": 1}}',
    ],
)
def test_a_hostile_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match="line 2"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_conversation_of_nested_calls(tmp_path: Path, name: str) -> None:
    from trinity_megatron.data.chat.conversations import read_conversations

    calls = "[" * 900 + "]" * 900
    message = f'{{"role": "assistant", "content": "", "tool_calls": {calls}}}'
    rows = [f'{{"messages": [{message}]}}'] * 2
    (tmp_path / name).write_text("\n".join(rows) if name == "a.jsonl" else f"[{','.join(rows)}]")
    options = ReadOptions(text_key="messages")
    with pytest.raises(UserError, match="nested too deeply"):
        files, _ = find_files([tmp_path / name], options=options)
        list(read_conversations(files, options, lambda conversation: conversation))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for _ in range(4):
        builder.add_document(torch.arange(10), [10])
    builder.finalize(str(tmp_path / "a.idx"))
    found = read_dataset_head(tmp_path / "a", "key")
    assert (found.documents, found.tokens, found.has_modes) == (4, 40, False)
    return tmp_path / "a.idx"


HEAD = struct.Struct("<9sQBQQ")
LIES: dict[str, Callable[[bytes], bytes]] = {
    "many sequences": lambda content: head(content, 3, 2**62),
    "few sequences": lambda content: head(content, 3, 1),
    "many documents": lambda content: head(content, 4, 2**40),
    "no documents": lambda content: head(content, 4, 0),
    "another type": lambda content: head(content, 2, 99),
    "another version": lambda content: head(content, 1, 9),
    "cut": lambda content: content[:-1],
    "nothing": lambda content: b"",
    "a pickle": lambda content: b"\x80\x04cposix\nsystem\n.",
    "the last document": lambda content: content[:-8] + struct.pack("<q", 2**60),
}


def head(content: bytes, field: int, value: int) -> bytes:
    values = [*HEAD.unpack(content[: HEAD.size])]
    values[field] = value
    return HEAD.pack(*values) + content[HEAD.size :]


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_lies(index: Path, name: str) -> None:
    index.write_bytes(LIES[name](index.read_bytes()))
    with pytest.raises(UserError, match="is no whole index of token ids"):
        read_dataset_head(index.with_suffix(""), "corpora.web.path")


def test_token_ids_are_no_objects(tmp_path: Path) -> None:
    from trinity_megatron.evaluation.tokens import read_tokens

    path = tmp_path / "tokens.npy"
    text = b"{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000,), }"
    hostile = [
        b"\x93NUMPY\x01\x00v\x00" + text.ljust(117) + b"\n" + bytes(80),
        b"\x80\x04cposix\nsystem\n.",
        b"",
    ]
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    hostile.append(path.read_bytes())
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    hostile.append((tmp_path / "a.npz").read_bytes())
    for content in hostile:
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no rows of token ids"):
            read_tokens(path, 100)
    for text in ("[" * 100_000, "[1e400]", '{"a": 1}', f"[{10**40}]", "9" * 400):
        path = tmp_path / ("tokens.json" if text[0] != "9" else "tokens.txt")
        path.write_text(text)
        with pytest.raises(UserError, match="holds no rows of token ids"):
            read_tokens(path, 100)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "x\0y"])
def test_a_manifest_that_names_other_files(tmp_path: Path, path: str) -> None:
    from tests.unit_tests.data.test_manifest import INPUTS
    from trinity_megatron.data.manifest import (
        MANIFEST_NAME,
        DataManifest,
        SplitSummary,
        load_manifest,
        save_manifest,
    )

    split = SplitSummary(1, 1, 1, 1.0)
    save_manifest(DataManifest(tmp_path, INPUTS, 0, "0" * 64, split, split, (), {path: 1}))
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["files"] == {path: 1}
    with pytest.raises(UserError, match="leads out of the folder"):
        load_manifest(tmp_path)
