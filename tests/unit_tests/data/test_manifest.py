"""The manifest of a prepared data folder."""

import dataclasses
import hashlib
import json
import struct

import pytest

from trinity_megatron.data.corpus import Skipped
from trinity_megatron.data.inputs import DataInputs
from trinity_megatron.data.manifest import (
    DataManifest,
    SplitSummary,
    UnsupportedFormatError,
    load_manifest,
    save_manifest,
)

INPUTS = DataInputs(
    vocab_size=512,
    validation_fraction=0.05,
    min_split_tokens=2048,
    pre_tokenizer="trinity-1",
    sources=(("a.txt", "11"), ("b\udcff.txt", "22"), ("c.txt", "33")),
)


@pytest.fixture
def manifest(tmp_path):
    """A folder as it is after preparing, with its manifest."""
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 0, 0)
    contents = {"train.bin": b"12", "train.idx": index, "tokenizer/tokenizer.json": b"{}"}
    (tmp_path / "tokenizer").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    manifest = DataManifest(
        path=tmp_path,
        inputs=INPUTS,
        eod_id=0,
        tokenizer_fingerprint=hashlib.sha256(b"{}").hexdigest(),
        train=SplitSummary(10, 1000, 4000, 6.25),
        validation=SplitSummary(1, 100, 400, 5.125),
        skipped=(Skipped("d.png", "binary"),),
        files={name: len(content) for name, content in contents.items()},
    )
    save_manifest(manifest)
    return manifest


def change(manifest, edit):
    path = manifest.path / "manifest.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def test_what_is_saved_is_loaded(manifest):
    loaded = load_manifest(manifest.path)

    assert loaded == manifest
    assert loaded.fingerprint == INPUTS.fingerprint
    assert loaded.vocab_size == 512
    assert loaded.train_prefix.with_suffix(".bin").is_file()
    assert sorted(path.name for path in manifest.path.iterdir()) == [
        "manifest.json",
        "tokenizer",
        "train.bin",
        "train.idx",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 513}, "vocab_size 512 -> 513"),
        ({"validation_fraction": 0.1}, "validation_fraction 0.05 -> 0.1"),
        ({"reader": "content-1"}, "reader default -> content-1"),
        ({"text_key": "content"}, "text_key default -> content"),
        ({"split_on": "\n\n"}, r"split_on default -> \n\n"),
        ({"skip_bad_rows": 3}, "skip_bad_rows default -> 3"),
        ({"plain_text": True}, "plain_text default -> True"),
        ({"validation_tokens": 32768}, "validation_tokens default -> 32768"),
        ({"pre_tokenizer": "trinity-2"}, "pre_tokenizer trinity-1 -> trinity-2"),
        ({"sources": (*INPUTS.sources, ("d", "44"))}, "1 source files added (d)"),
        ({"sources": INPUTS.sources[1:]}, "1 source files removed (a.txt)"),
        ({"sources": (("a.txt", "12"), *INPUTS.sources[1:])}, "1 source files changed (a.txt)"),
        ({"sources": (INPUTS.sources[0], *INPUTS.sources)}, "how often a source file is given"),
    ],
)
def test_every_input_counts_and_its_change_is_put_in_words(change, words):
    other = dataclasses.replace(INPUTS, **change)

    assert other.fingerprint != INPUTS.fingerprint
    assert INPUTS.differences(other) == [words]
    assert INPUTS.differences(INPUTS) == []


def test_the_address_of_data_with_a_trained_tokenizer_stays(manifest):
    assert INPUTS.fingerprint == "e1e69e83d10b4c8270dd5cb5b3ee91f8d65dc1c821657c6c6996f59f611bcb84"
    saved = json.loads((manifest.path / "manifest.json").read_text())["inputs"]
    fields = {"vocab_size", "validation_fraction", "min_split_tokens", "pre_tokenizer", "sources"}
    assert set(saved) == fields  # what earlier releases read and wrote


def test_a_given_tokenizer_is_part_of_the_address_and_of_the_manifest(manifest):
    given = dataclasses.replace(INPUTS, tokenizer="ab" * 32, eos_token="<｜end｜>")
    other = dataclasses.replace(given, tokenizer="cd" * 32)
    ended = dataclasses.replace(given, eos_token="</s>")

    assert len({inputs.fingerprint for inputs in (INPUTS, given, other, ended)}) == 4
    words = "tokenizer trained on the sources -> given (SHA-256 abababababab)"
    assert INPUTS.differences(given) == [words]
    assert given.differences(INPUTS) == [
        "tokenizer given (SHA-256 abababababab) -> trained on the sources"
    ]
    assert given.differences(other) == [
        "tokenizer given (SHA-256 abababababab) -> given (SHA-256 cdcdcdcdcdcd)"
    ]
    assert given.differences(ended) == ["eos_token '<｜end｜>' -> '</s>'"]
    save_manifest(dataclasses.replace(manifest, inputs=given))
    assert load_manifest(manifest.path).inputs == given


def test_a_missing_folder_or_manifest_names_the_command(manifest):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist.*prepare-data --out"):
        load_manifest(manifest.path / "nowhere")
    (manifest.path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="half-written.*trinity-megatron prepare-data"):
        load_manifest(manifest.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format_version": 1}', b"\xff"])
def test_a_manifest_that_cannot_be_read_is_corrupt(manifest, content):
    (manifest.path / "manifest.json").write_bytes(content)

    with pytest.raises(ValueError, match=r"manifest.json is corrupt.*prepare-data --out"):
        load_manifest(manifest.path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values.pop("train"),
        lambda values: values["train"].pop("tokens"),
        lambda values: values["inputs"].update(vocab_size=1024),
        lambda values: values["inputs"]["sources"].pop(),
        lambda values: values.update(files=None),
        lambda values: values.update(files=["train.bin"]),
        lambda values: values.update(files={"train.bin": "2"}),
        lambda values: values.update(files={"train.bin": -1}),
        lambda values: values.update(inputs=[]),
        lambda values: values.update(inputs="text"),
        lambda values: values["inputs"].update(vocab_size="512"),
        lambda values: values["inputs"].update(validation_fraction=None),
        lambda values: values["inputs"].update(sources=[["a.txt", 11]]),
        lambda values: values["inputs"].update(sources={"a.txt": "11"}),
        lambda values: values["inputs"].update(plain_text=1),
        lambda values: values.update(eod_id="0"),
        lambda values: values.update(eod_id=True),
        lambda values: values.update(tokenizer_fingerprint=None),
        lambda values: values.update(train=None),
        lambda values: values["train"].update(tokens=1000.5),
        lambda values: values["train"].update(unigram_entropy=float("nan")),
        lambda values: values["validation"].update(documents=[1]),
        lambda values: values.update(skipped=["d.png"]),
        lambda values: values.update(skipped=[{"name": "d.png", "reason": None}]),
    ],
)
def test_a_manifest_that_contradicts_itself_is_corrupt(manifest, edit):
    change(manifest, edit)

    with pytest.raises(ValueError, match="manifest.json is corrupt"):
        load_manifest(manifest.path)


def test_another_format_is_refused_as_such(manifest):
    change(manifest, lambda values: values.update(format_version=2))

    with pytest.raises(UnsupportedFormatError, match=r"format_version is 2.*reads 1; remove"):
        load_manifest(manifest.path)


@pytest.mark.parametrize("version", ["1", True, 1.0, None, [1]])
def test_a_version_that_is_no_number_is_refused(manifest, version):
    change(manifest, lambda values: values.update(format_version=version))

    with pytest.raises(UnsupportedFormatError, match="format_version is .*reads 1; remove"):
        load_manifest(manifest.path)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, '"text"', "1"])
def test_json_that_is_no_manifest_is_corrupt(manifest, content):
    (manifest.path / "manifest.json").write_text(content)

    with pytest.raises(ValueError, match="manifest.json is corrupt"):
        load_manifest(manifest.path)


def test_a_manifest_that_is_a_folder_is_named(manifest):
    (manifest.path / "manifest.json").unlink()
    (manifest.path / "manifest.json").mkdir()

    with pytest.raises(ValueError, match=r"manifest.json cannot be read \(Is a directory\)"):
        load_manifest(manifest.path)


@pytest.mark.parametrize("name", ["/etc/hostname", "../x.bin", "tokenizer/../../x", "a\0b", ".."])
def test_names_that_lead_out_of_the_folder_are_refused(manifest, name):
    change(manifest, lambda values: values["files"].update({name: 1}))

    with pytest.raises(ValueError, match="of manifest.json leads out of the folder; do not use"):
        load_manifest(manifest.path)


@pytest.mark.parametrize("name", ["train.bin", "tokenizer"])
def test_links_out_of_the_folder_are_refused_and_inside_followed(manifest, name, tmp_path):
    path = manifest.path / name
    inside = path.rename(manifest.path / "moved")
    path.symlink_to("moved")
    assert load_manifest(manifest.path) == manifest

    outside = inside.rename(manifest.path.parent / f"{manifest.path.name}-outside")
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(ValueError, match=rf"'{name}.* leads out of the folder"):
        load_manifest(manifest.path)


def test_damaged_files_are_named(manifest):
    folder = manifest.path
    (folder / "tokenizer" / "tokenizer.json").write_bytes(b"[]")  # of the same size
    with pytest.raises(ValueError, match=r"tokenizer.json is not the file.*prepare-data"):
        load_manifest(folder)
    (folder / "train.idx").write_bytes(bytes(34))
    with pytest.raises(ValueError, match="train.idx is no whole index .*prepare-data"):
        load_manifest(folder)
    (folder / "train.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match="train.bin has 1 bytes, not 2"):
        load_manifest(folder)
    (folder / "train.bin").unlink()
    with pytest.raises(ValueError, match="damaged: train.bin is missing"):
        load_manifest(folder)
