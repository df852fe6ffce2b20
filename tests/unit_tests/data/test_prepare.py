"""Preparing a corpus: no document is lost or mixed up, and incomplete output never counts."""

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from trinity_megatron.data.formats import ReadOptions
from trinity_megatron.data.manifest import load_manifest
from trinity_megatron.data.prepare import prepare_data
from trinity_megatron.data.split import (
    MAX_WANTED_SHARE,
    MIN_SPLIT_TOKENS,
    WANTED_VALIDATION_TOKENS,
    select_validation,
)
from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE = 300
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def texts():
    """Real documents of a few kilobytes, and difficult ones."""
    files = sorted((STDLIB / "email").glob("*.py"))
    real = [path.read_text("utf-8")[:6000] for path in files]
    return [text for text in real if text] + ["日本語 12345 😀\r\n" * 40, "<|endoftext|>", " "]


@pytest.fixture
def source(texts, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode("utf-8"))
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "nested" / "out"


def prepare(out, source, **options):
    return prepare_data(out, [source], **{"vocab_size": VOCAB_SIZE, **options})


def read_split(manifest, split) -> list[list[int]]:
    """The documents of a split as Megatron sees them."""
    dataset = IndexedDataset(str(manifest.path / split))
    assert len(dataset.document_indices) - 1 == len(dataset)
    return [document.tolist() for document in dataset]


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def entropy_by_definition(documents) -> float:
    counts = Counter(token for document in documents for token in document)
    total = sum(counts.values())
    return -math.fsum(n / total * math.log(n / total) for n in counts.values())


def random_keys(count):
    return np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)


def test_validation_is_its_share_and_stays_when_documents_are_added():
    keys = random_keys(20_000)
    sizes = np.full(len(keys), 100)

    few = select_validation(keys[:10_000], sizes[:10_000], fraction=0.05, min_bytes=1)
    many = select_validation(keys, sizes, fraction=0.05, min_bytes=1)

    assert many.mean() == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 20_000))
    assert np.array_equal(few, many[:10_000])


def test_equal_documents_are_on_one_side():
    keys = np.repeat(random_keys(50), 7)
    sizes = np.full(len(keys), 10)

    for fraction in (0.001, 0.2, 0.5):
        held_out = select_validation(keys, sizes, fraction=fraction, min_bytes=200)
        sides = held_out.reshape(50, 7)
        assert np.array_equal(sides.all(1), sides.any(1))
        assert 1 <= sides.all(1).sum() <= 49


@pytest.mark.parametrize("min_bytes", [1, 100, 101, 350, 899])
def test_validation_grows_to_its_minimum_and_no_further(min_bytes):
    sizes = np.full(10, 100)

    held_out = select_validation(random_keys(10), sizes, fraction=1e-9, min_bytes=min_bytes)

    assert sizes[held_out].sum() == math.ceil(min_bytes / 100) * 100


def test_both_sides_get_a_document_or_the_corpus_is_refused():
    keys, sizes = random_keys(5), np.full(5, 100)

    assert select_validation(keys, sizes, fraction=0.9999, min_bytes=1).sum() == 4
    with pytest.raises(ValueError, match="too small: 5 distinct documents with 500 bytes"):
        select_validation(keys, sizes, fraction=0.05, min_bytes=401)
    with pytest.raises(ValueError, match=r"1 distinct documents \(3 in all\), which cannot be spl"):
        select_validation(keys[[0, 0, 0]], sizes[:3], fraction=0.05, min_bytes=1)


def test_wanted_validation_is_given_up_to_its_share_of_the_text():
    keys, sizes = random_keys(100), np.full(100, 10)
    chosen = [
        select_validation(keys, sizes, fraction=0.001, min_bytes=1, wanted_bytes=wanted).sum()
        for wanted in (0, 15, 75, 100, 101, 10**9)
    ]
    assert chosen == [1, 2, 8, 10, 10, 10]

    sizes[np.argsort(keys)[3]] = 800  # the fourth document would exceed the share
    held_out = select_validation(keys, sizes, fraction=0.001, min_bytes=1, wanted_bytes=10**9)
    assert held_out.sum() == 3
    held_out = select_validation(keys, sizes, fraction=0.001, min_bytes=31, wanted_bytes=10**9)
    assert held_out.sum() == 4  # the minimum goes before


def make_rows(path: Path, count: int, key: str = "text") -> Path:
    letters = np.random.default_rng(1).integers(ord("a"), ord("f"), (count, 600))
    rows = [{key: "".join(map(chr, row))} for row in letters]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_validation_holds_sequences_of_the_longest_preset_where_the_corpus_is_large(tmp_path):
    from trinity_megatron.model.presets import PRESETS

    longest = max(preset.training["seq_length"] for preset in PRESETS.values())
    assert 4 * longest <= WANTED_VALIDATION_TOKENS
    large = prepare(tmp_path / "large", make_rows(tmp_path / "l.jsonl", 1500))
    small = prepare(tmp_path / "small", make_rows(tmp_path / "s.jsonl", 300))
    enough = prepare(
        tmp_path / "enough", tmp_path / "l.jsonl", validation_fraction=0.2, vocab_size=259
    )

    assert WANTED_VALIDATION_TOKENS <= large.validation.tokens < 1.2 * WANTED_VALIDATION_TOKENS
    assert small.validation.documents == MAX_WANTED_SHARE * 300
    for manifest in (large, small):
        assert manifest.inputs.validation_tokens == WANTED_VALIDATION_TOKENS
    assert enough.inputs.validation_tokens is None  # as earlier releases made it
    before = snapshot(tmp_path / "large")
    assert prepare(tmp_path / "large", tmp_path / "l.jsonl") == large
    assert snapshot(tmp_path / "large") == before


def test_a_folder_of_an_earlier_release_with_a_short_validation_is_kept(tmp_path):
    source = make_rows(tmp_path / "s.jsonl", 300)
    manifest = prepare(tmp_path / "out", source)
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    del values["inputs"]["validation_tokens"]
    values["fingerprint"] = dataclasses.replace(manifest.inputs, validation_tokens=None).fingerprint
    path.write_text(json.dumps(values))

    assert prepare(tmp_path / "out", source).inputs.validation_tokens is None


def test_what_decides_the_content_decides_the_address(tmp_path):
    source = make_rows(tmp_path / "rows.jsonl", 300, key="content")
    first = prepare(tmp_path / "out", source, options=ReadOptions(text_key="content"))
    assert first.inputs.text_key == "content" and first.inputs.reader is None

    with pytest.raises(ValueError, match="text_key content -> default"):
        prepare(tmp_path / "out", source)
    with pytest.raises(ValueError, match="skip_bad_rows default -> 2"):
        options = ReadOptions(text_key="content", skip_bad_rows=2)
        prepare(tmp_path / "out", source, options=options)
    renamed = source.rename(tmp_path / "rows.json")  # earlier releases read it as one text
    second = prepare(tmp_path / "second", renamed, options=ReadOptions(text_key="content"))
    assert second.inputs.reader == "content-1"
    assert second.train == first.train


def test_too_much_left_out_publishes_nothing(source, out, texts):
    (source / "latin.txt").write_bytes(("größe " * 99_000).encode("latin-1"))

    with pytest.raises(ValueError, match="source/latin.txt: not UTF-8 text.*--max-left-out"):
        prepare(out, source)
    assert not out.exists()
    manifest = prepare(out, source, max_left_out=1)
    assert manifest.train.documents + manifest.validation.documents == len(texts)
    with pytest.raises(ValueError, match="max_left_out 1.5 is not between 0 and 1"):
        prepare(out, source, max_left_out=1.5)


def test_nothing_is_lost_and_every_document_ends(source, out, texts):
    (source / "copy.txt").write_text(texts[0])
    (source / "empty.txt").touch()
    (source / "image.png").write_bytes(b"\x89PNG\0")

    manifest = prepare(out, source)

    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path / "tokenizer.json"))
    found: Counter[str] = Counter()
    for split, summary in (("train", manifest.train), ("validation", manifest.validation)):
        documents = read_split(manifest, split)
        decoded = [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents]
        found.update(decoded)
        assert all(ids.index(manifest.eod_id) == len(ids) - 1 for ids in documents)
        assert summary.documents == len(documents) > 0
        assert summary.tokens == sum(map(len, documents)) >= MIN_SPLIT_TOKENS
        assert summary.bytes == sum(len(text.encode("utf-8")) for text in decoded)
        assert summary.unigram_entropy == pytest.approx(entropy_by_definition(documents))
    assert found == Counter([*texts, texts[0]])
    assert {entry.name: entry.reason.partition(":")[0] for entry in manifest.skipped} == {
        "source/empty.txt": "empty",
        "source/image.png": "binary",
    }
    assert manifest == load_manifest(out)


def test_the_same_corpus_gives_the_same_files_wherever_it_lies(source, out, tmp_path):
    moved = tmp_path / "elsewhere" / "source"
    shutil.copytree(source, moved)

    first = prepare(out, source)
    second = prepare(tmp_path / "again", moved)

    assert first.fingerprint == second.fingerprint
    content = [
        {name: digest for name, (_, digest) in snapshot(m.path).items()} for m in (first, second)
    ]
    assert content[0] == content[1]


def test_no_text_of_validation_reaches_the_tokenizer(tmp_path):
    letters = np.random.default_rng(0).integers(ord("a"), ord("z"), (60, 8))
    rows = ["".join(map(chr, word)) + " " for word in letters]  # each document its own word
    rows = [row * 300 for row in rows]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    manifest = prepare(tmp_path / "out", source, vocab_size=450)

    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path / "tokenizer.json"))
    held_out = {tokenizer.decode(ids[:-1]) for ids in read_split(manifest, "validation")}
    seen = [row for row in rows if row not in held_out]
    assert len(seen) == manifest.train.documents
    assert tokenizer.to_str() == train_tokenizer(seen, vocab_size=450).to_str()
    assert tokenizer.to_str() != train_tokenizer(rows, vocab_size=450).to_str()


@pytest.mark.parametrize("fraction", [1e-6, 0.05, 0.5])
def test_validation_holds_enough_tokens(source, out, fraction):
    manifest = prepare(out, source, validation_fraction=fraction)

    assert manifest.validation.tokens >= MIN_SPLIT_TOKENS
    assert manifest.train.tokens > manifest.validation.tokens / 4


def test_a_second_call_changes_nothing(source, out):
    first = prepare(out, source)
    before = snapshot(out)
    for path in source.iterdir():
        os.utime(path)  # only contents count

    start = time.monotonic()
    second = prepare(out, source)

    assert time.monotonic() - start < 1
    assert second == first
    assert snapshot(out) == before


def test_other_inputs_are_refused_and_named(source, out):
    prepare(out, source)
    before = snapshot(out)

    with pytest.raises(ValueError, match=r"vocab_size 300 -> 320; pass another --out, or remove"):
        prepare(out, source, vocab_size=320)
    with pytest.raises(ValueError, match=r"validation_fraction 0.05 -> 0.1"):
        prepare(out, source, validation_fraction=0.1)
    with (source / "000.txt").open("a") as stream:
        stream.write("more")
    (source / "new.txt").write_text("new")
    with pytest.raises(ValueError, match=r"changed \(source/000.txt\); 1 source files added"):
        prepare(out, source)
    assert snapshot(out) == before


@pytest.mark.parametrize("name", ["manifest.json", "train.bin", "validation.idx", "tokenizer"])
def test_a_half_written_folder_is_prepared_again(source, out, name, caplog):
    whole = prepare(out, source)
    path = out / name
    if path.is_dir():
        shutil.rmtree(path)
    elif name == "train.bin":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.unlink()
    cache = out / "cache" / "GPTDataset_indices"  # Megatron's, of data that are no more
    cache.mkdir(parents=True)

    with pytest.raises((ValueError, FileNotFoundError), match="trinity-megatron prepare-data"):
        load_manifest(out)
    assert prepare(out, source) == whole
    assert load_manifest(out) == whole
    assert not cache.exists()
    assert "half-written or damaged" in caplog.text


def test_a_folder_with_other_files_is_left_alone(source, out):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\); pass --out"):
        prepare(out, source)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match="thesis.tex is a file; pass --out with a folder"):
        prepare(out / "thesis.tex", source)


def test_the_output_may_lie_inside_the_source(source):
    first = prepare(source / "out", source)

    assert prepare(source / "out", source) == first
    assert not any(name.startswith("source/out") for name, _ in first.inputs.sources)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_share_outside_of_0_and_1_is_refused(source, out, fraction):
    with pytest.raises(ValueError, match=r"validation_fraction .* is not between 0 and 1"):
        prepare(out, source, validation_fraction=fraction)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (["only one document " * 400], r"1 distinct documents \(1 in all\)"),
        (["the same " * 400] * 3, r"1 distinct documents \(3 in all\)"),
        ([""], r"0 distinct documents \(0 in all\)"),
        (["little", "text"], "sources are too small: 2 distinct documents with 10 bytes"),
    ],
)
def test_a_corpus_that_cannot_be_split_is_refused(tmp_path, out, contents, reason):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in contents))

    with pytest.raises(ValueError, match=f"{reason}.*add documents"):
        prepare(out, source)
    assert not out.exists()
    assert not list(out.parent.glob(".out.building-*"))


def test_a_vocabulary_that_cannot_be_filled_leaves_nothing_behind(source, out):
    with pytest.raises(ValueError, match="vocab_size 100000 cannot be filled"):
        prepare(out, source, vocab_size=100_000)
    with pytest.raises(ValueError, match="vocab_size 200 is too small"):
        prepare(out, source, vocab_size=200)
    assert [path.name for path in out.parent.iterdir()] == [".out.lock"]


END = "<|end_of_document|>"


@pytest.fixture(scope="module")
def trained(texts):
    return train_tokenizer(texts, vocab_size=VOCAB_SIZE)


@pytest.fixture
def model(trained, tmp_path):
    """A model's folder whose tokenizer was trained here."""
    folder = tmp_path / "model"
    save_tokenizer(trained, folder)
    (folder / "config.json").write_text('{"model_type": "afmoe"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def model_with_added_end(trained, model):
    """The same with an end-of-text token that is no part of the BPE vocabulary."""
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(model / "tokenizer.json"))
    path = model / "tokenizer_config.json"
    token = {"__type": "AddedToken", "content": END, "special": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": token}))
    return model


@pytest.mark.parametrize("kind", ["model", "model_with_added_end"])
def test_a_given_tokenizer_is_used_as_it_is(source, out, texts, kind, request, monkeypatch):
    from megatron.core.tokenizers import MegatronTokenizer

    folder = request.getfixturevalue(kind)
    (source / "ends.txt").write_text(f"a {END} b{END}")

    manifest = prepare(out, source, tokenizer=folder)

    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in manifest.tokenizer_path.iterdir()) == names
    for name in names:
        content = (folder / name).read_bytes()
        assert (manifest.tokenizer_path / name).read_bytes() == content
        assert manifest.files[f"tokenizer/{name}"] == len(content)
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest.tokenizer_fingerprint == manifest.inputs.tokenizer == digest
    assert manifest == load_manifest(out)

    def refuse(*_):
        raise AssertionError("the network is not needed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = MegatronTokenizer.from_pretrained(
        str(manifest.tokenizer_path), {"library": "huggingface"}
    )
    eod_id = {"model": 0, "model_with_added_end": VOCAB_SIZE}[kind]
    assert loaded.eod == manifest.eod_id == eod_id
    assert loaded.vocab_size == manifest.vocab_size == max(VOCAB_SIZE, eod_id + 1)
    documents = [ids for split in ("train", "validation") for ids in read_split(manifest, split)]
    assert all(ids.index(eod_id) == len(ids) - 1 for ids in documents)
    decoded = [loaded.detokenize(ids[:-1]) for ids in documents]
    assert Counter(decoded) == Counter([*texts, f"a {END} b{END}"])


def test_the_same_tokenizer_given_or_trained_encodes_the_same(source, out, tmp_path):
    first = prepare(out, source)

    second = prepare(tmp_path / "again", source, tokenizer=first.tokenizer_path)

    assert second.fingerprint != first.fingerprint
    for name in first.files:
        assert (second.path / name).read_bytes() == (first.path / name).read_bytes()
    assert (second.train, second.validation) == (first.train, first.validation)


def test_ids_beyond_16_bits_are_kept(source, out, model, texts):
    path = model / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["model"]["vocab"]["e"] = 70_000
    path.write_text(json.dumps(values), "utf-8")

    manifest = prepare(out, source, tokenizer=model)

    assert manifest.vocab_size == 70_001
    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path / "tokenizer.json"))
    found = []
    for split, summary in (("train", manifest.train), ("validation", manifest.validation)):
        documents = read_split(manifest, split)
        assert any(70_000 in ids for ids in documents)
        assert summary.tokens == sum(map(len, documents))
        assert manifest.files[f"{split}.bin"] == 4 * summary.tokens
        assert summary.unigram_entropy == pytest.approx(entropy_by_definition(documents))
        found += [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents]
    assert sorted(found) == sorted(texts)


def test_another_tokenizer_is_refused_and_named(source, out, model):
    first = prepare(out, source, tokenizer=model)
    before = snapshot(out)

    assert prepare(out, source, tokenizer=model, vocab_size=5) == first  # without effect
    with pytest.raises(ValueError, match=r"tokenizer given \(SHA-256 \w+\) -> trained on the so"):
        prepare(out, source)
    path = model / "tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=r"inputs: tokenizer given \(.*\) -> given \(.*; pass"):
        prepare(out, source, tokenizer=model)
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match=r"vocab_size 300 -> 301; tokenizer given \("):
        prepare(out, source, tokenizer=model)
    assert snapshot(out) == before


def test_an_unusable_tokenizer_leaves_nothing_behind(source, out, model):
    (model / "tokenizer.json").write_text("{}")

    with pytest.raises(ValueError, match="tokenizer.json cannot be loaded"):
        prepare(out, source, tokenizer=model)
    assert not out.parent.exists()


def test_a_tokenizer_inside_the_folder_to_write_is_not_lost(source, out):
    manifest = prepare(out, source)
    (out / "manifest.json").unlink()  # to be prepared again

    with pytest.raises(ValueError, match=r"tokenizer lies inside out .*; pass --tokenizer with"):
        prepare(out, source, tokenizer=manifest.tokenizer_path)
    assert (manifest.tokenizer_path / "tokenizer.json").is_file()


def fork(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_killed_process_leaves_nothing_that_counts(source, out):
    process = fork(prepare_data, out)  # the standard library: seconds of work
    while not list(out.parent.glob(".out.building-*/*")) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(out.parent.glob(".out.building-*"))

    with pytest.raises(FileNotFoundError, match="prepare-data --out"):
        load_manifest(out)
    manifest = prepare(out, source)
    assert load_manifest(out) == manifest
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_builders_that_race_end_with_one_good_result(source, out, tmp_path):
    expected = prepare(tmp_path / "alone", source)

    racers = [fork(prepare, out, source) for _ in range(3)]
    for process in racers:
        process.join()

    assert [process.exitcode for process in racers] == [0, 0, 0]
    manifest = load_manifest(out)
    assert manifest.files == expected.files
    assert read_split(manifest, "train") == read_split(expected, "train")
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]


def test_megatron_trains_on_it_and_learns_the_end_of_a_document(source, out):
    """The end-of-text token doubles as padding; as a label it must still count."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    manifest = prepare(out, source)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend_per_split=[
            ([str(manifest.train_prefix)], None),
            ([str(manifest.validation_prefix)], None),
            None,
        ],
        path_to_cache=str(out.parent / "cache"),
        tokenizer=MegatronTokenizer.from_pretrained(
            str(manifest.tokenizer_path), {"library": "huggingface"}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    with pytest.warns(UserWarning, match="pad token id"):
        train, validation, _ = BlendedMegatronDatasetBuilder(
            GPTDataset, [300, 20, None], lambda: True, config
        ).build()

    samples = [train[index] for index in range(300)]
    ends = sum(int((sample["labels"] == manifest.eod_id).sum()) for sample in samples)
    assert ends > 0
    assert all(bool((sample["loss_mask"] == 1).all()) for sample in samples)
    assert len(validation) >= 20
