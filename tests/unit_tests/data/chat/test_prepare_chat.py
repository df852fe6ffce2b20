"""``prepare-data --chat``: every file format, what is refused, and the folder that is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest

from tests.unit_tests.data.chat.chat_cases import WITH_GENERATION, make_conversations
from trinity_megatron.data.chat.conversations import parse_conversation
from trinity_megatron.data.chat.prepare import prepare_chat
from trinity_megatron.data.chat.template import load_chat_template
from trinity_megatron.data.formats import ReadOptions
from trinity_megatron.data.given_tokenizer import load_tokenizer
from trinity_megatron.data.manifest import load_manifest
from trinity_megatron.data.rows import RowError
from trinity_megatron.errors import UserError

CONVERSATIONS = make_conversations(40, with_tools=True)
ROWS: list[dict[str, Any]] = [
    {"messages": list(item.messages), **({"tools": item.tools} if item.tools else {})}
    for item in CONVERSATIONS
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(WITH_GENERATION)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        import pyarrow
        import pyarrow.parquet

        whole = [{"tools": None, **row} for row in rows]  # the first row has all columns
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), path)
    return path


def read_back(prefix: Path) -> list[tuple[list[int], list[bool]]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix), multimodal=True)
    found = []
    firsts = data.document_indices
    for first, last in zip(firsts[:-1], firsts[1:], strict=True):
        sequences, modes = data[int(first) : int(last)]
        mask = np.repeat(modes == 1, [len(sequence) for sequence in sequences])
        found.append((np.concatenate(sequences).tolist(), mask.tolist()))
        assert all(a != b for a, b in zip(modes[:-1], modes[1:], strict=True))
    return found


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_folder_holds_every_conversation_with_its_mask(
    suffix: str, saved: Path, template: Path, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / f"rows{suffix}", ROWS)
    manifest = prepare_chat(
        tmp_path / "out", [source], tokenizer=saved, template=str(template), validation_fraction=0.2
    )
    chat = load_chat_template(saved, str(template))
    encoded = [chat.encode(item) for item in CONVERSATIONS]
    expected = [(item.tokens.tolist(), item.is_assistant.tolist()) for item in encoded]
    parts = [read_back(tmp_path / "out" / split) for split in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(expected)
    assert [len(part) for part in parts] == [
        manifest.train.documents,
        manifest.validation.documents,
    ]
    assert 0 < manifest.validation.documents < 20
    assert manifest.train.tokens == sum(len(tokens) for tokens, _ in parts[0])
    assert load_manifest(tmp_path / "out") == manifest
    assert not (tmp_path / "out" / "draft").exists()


def test_the_tokenizer_keeps_the_template_and_stops_at_the_end_of_a_turn(
    saved: Path, template: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    source = write_rows(tmp_path / "rows.jsonl", ROWS)
    options: Any = {"tokenizer": saved, "template": str(template)}
    manifest = prepare_chat(tmp_path / "out", [source], **options)
    kept = AutoTokenizer.from_pretrained(manifest.tokenizer_path)
    assert kept.chat_template == WITH_GENERATION and kept.eos_token == "<|im_end|>"
    assert kept.eos_token_id == manifest.eod_id == 2
    # The vocabulary is that of the model, and the folder is made once.
    assert manifest.tokenizer_fingerprint == load_tokenizer(saved).fingerprint
    assert prepare_chat(tmp_path / "out", [source], **options) == manifest
    with pytest.raises(UserError, match="data made from other inputs: chat "):
        prepare_chat(
            tmp_path / "out",
            [source],
            tokenizer=saved,
            template=str(write_template(tmp_path, WITH_GENERATION + " ")),
        )


def write_template(folder: Path, source: str) -> Path:
    path = folder / "other.jinja"
    path.write_text(source)
    return path


def test_bad_rows_are_refused_by_name_or_left_out_and_counted(saved: Path, tmp_path: Path) -> None:
    good = [row for row in ROWS if "tools" not in row and "tool_calls" not in json.dumps(row)]
    bad = {"messages": [{"role": "user", "content": "only a question"}]}
    source = write_rows(tmp_path / "rows.jsonl", [*good[:5], bad, *good[5:]])
    with pytest.raises(UserError, match=r"rows.jsonl, line 6: no message of the assistant"):
        prepare_chat(tmp_path / "out", [source], tokenizer=saved)
    options = ReadOptions(text_key="messages", skip_bad_rows=1)
    manifest = prepare_chat(tmp_path / "out", [source], tokenizer=saved, options=options)
    assert [(entry.name, entry.reason) for entry in manifest.skipped] == [
        ("rows.jsonl:6", "bad row")
    ]
    assert manifest.train.documents + manifest.validation.documents == len(good)


def test_sources_without_conversations(saved: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("words")
    with pytest.raises(UserError, match="words.txt has no rows of conversations"):
        prepare_chat(
            tmp_path / "out", [text], tokenizer=saved, options=ReadOptions(text_key="text")
        )
    with pytest.raises(UserError, match="--chat needs conversations"):
        prepare_chat(tmp_path / "out", [], tokenizer=saved)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "no field 'messages', only list"),
        ({"text": "a"}, "no field 'messages', only text; .*--text-key"),
        ({"messages": []}, "has no messages"),
        ({"messages": "not json"}, "a string that is not JSON"),
        ({"messages": {"role": "user"}}, "is dict, not a list"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "message 1 has no role, only from",
        ),
        ({"messages": [{"role": "user", "content": [1]}]}, "content is list, not a string"),
    ],
)
def test_rows_that_are_no_conversation(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_conversation(row)


def test_rows_as_other_tools_write_them() -> None:
    """JSON in a string, answers without content, and messages below another name."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    row = {"x": {"y": json.dumps([{"role": "user", "content": "a"}, call])}, "tools": '[{"n": 1}]'}
    found = parse_conversation(row, "x.y")
    assert found.messages[1] == {**call, "content": ""}
    assert found.tools == [{"n": 1}]


def test_special_tokens_do_not_touch_folders_of_earlier_releases(tmp_path: Path) -> None:
    from trinity_megatron.data.inputs import DataInputs
    from trinity_megatron.data.output_folder import find_existing
    from trinity_megatron.data.prepare import prepare_data

    source = tmp_path / "rows.jsonl"
    rows = [{"text": f"{number} is the number of this row. " * 9} for number in range(200)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepare_data(tmp_path / "out", [source], vocab_size=300)
    assert made.inputs.special_tokens is not None
    old: DataInputs = dataclasses.replace(made.inputs, special_tokens=None)
    values = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del values["inputs"]["special_tokens"]
    values["fingerprint"] = old.fingerprint
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(values))
    kept = find_existing(tmp_path / "out", made.inputs)
    assert kept is not None and kept.inputs.special_tokens is None


def test_an_arrow_stream_that_is_cut_between_two_batches(saved: Path, tmp_path: Path) -> None:
    rows = [row for row in ROWS if "tools" not in row and "tool_calls" not in json.dumps(row)]
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        for batch in table.to_batches(max_chunksize=4):
            stream.write_batch(batch)
            size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"a.arrow.*an Arrow stream without its end"):
        prepare_chat(tmp_path / "out", [path], tokenizer=saved)
