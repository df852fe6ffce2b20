"""The byte-level BPE tokenizer and its pre-tokenisation."""

import json
import shutil
import sysconfig
from argparse import Namespace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from trinity_megatron.data.given_tokenizer import copy_tokenizer, load_tokenizer
from trinity_megatron.data.pre_tokenizer import get_pre_tokenizer
from trinity_megatron.data.tokenizer import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    encode_documents,
    get_eod_id,
    save_tokenizer,
    train_tokenizer,
)

VOCAB_SIZE = 700

TEXTS = [
    "",
    "The quick brown fox -- it's 12345 metres (3.14159) away!\n",
    "  leading, trailing \t tabs\t\n\n\r\n   \r mixed   ",
    "0 00 000 0000 1234567890123 3,000,000 ½²Ⅷ ١٢٣٤٥",
    "日本語のテキスト、漢字12345とカナ。한국어 문장입니다 中文没有空格 ภาษาไทย ພາສາລາວ ខ្មែរ မြန်မာ",
    "e\u0301 combining, \u200bzero width, \ufeffmark, \x00\x01\x7f\x85 controls \u2028 lines",
    "👩‍👩‍👧‍👦 😀🏽 🇪🇺 ∑∞≠ ← \U0010ffff \ufffd \ue000",
    "def f(x):\n    return x ** 2  # 1234\n\n\tif a != b: pass\n",
    f"a {END_OF_TEXT} b{END_OF_TEXT}{END_OF_TEXT}",
    "Ġ Ċ ĉ č Ā ÿ look like bytes in the vocabulary",
]


@pytest.fixture(scope="module")
def corpus():
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text("utf-8") for path in sorted((stdlib / "json").glob("*.py"))]


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    save_tokenizer(tokenizer, folder)
    return folder


def pieces(text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in get_pre_tokenizer().pre_tokenize_str(text)]


def from_the_right(digits: str) -> list[str]:
    """Slow reference: groups of three counted from the end."""
    groups = []
    while digits:
        groups.insert(0, digits[-3:])
        digits = digits[:-3]
    return groups


@pytest.mark.parametrize("length", [*range(1, 14), 3000, 3001])
def test_digits_are_cut_in_threes_from_the_right(length):
    digits = ("1234567890" * (length // 10 + 1))[:length]

    assert pieces(digits) == from_the_right(digits)
    assert pieces(f"x={digits};") == ["x", "=", *from_the_right(digits), ";"]
    assert pieces(f"a {digits}b") == ["a", " ", *from_the_right(digits), "b"]
    assert pieces(f"{digits}.{digits}\n") == [
        *from_the_right(digits),
        ".",
        *from_the_right(digits),
        "\n",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world, again", ["Hello", " world", ",", " again"]),
        ("don't self.name(arg)", ["don", "'t", " self", ".name", "(arg", ")"]),
        ("a  b\n\n  c", ["a", " ", " b", "\n\n", " ", " c"]),
        ("x == y;\r\nz", ["x", " ==", " y", ";\r\n", "z"]),
        ("e\u0301te\u0301 naïve", ["e\u0301te\u0301", " naïve"]),
        ("see 東京タワー12345階 there", ["see", " ", "東京タワー", "12", "345", "階", " there"]),
        ("한국어abc ภาษาไทย", ["한국어", "abc", " ", "ภาษาไทย"]),
        ("ok 😀😀", ["ok", " 😀😀"]),
    ],
)
def test_text_is_cut_as_in_trinity(text, expected):
    assert pieces(text) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_loses_nothing(tokenizer, text):
    [ids] = encode_documents(tokenizer, [text])

    assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


def test_every_character_survives(tokenizer):
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 61)]
    text = "".join(map(chr, codes))
    [ids] = encode_documents(tokenizer, [text])

    assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_only_the_end_of_a_document_is_the_end(tokenizer, text):
    [ids] = encode_documents(tokenizer, [text])

    assert ids[-1] == get_eod_id(tokenizer)
    assert get_eod_id(tokenizer) not in ids[:-1]


def test_the_vocabulary_has_the_asked_size_and_no_long_number(tokenizer):
    vocabulary = tokenizer.get_vocab()

    assert sorted(vocabulary.values()) == list(range(VOCAB_SIZE))
    assert max(len(token) for token in vocabulary if token.isdigit()) <= 3


def test_the_same_corpus_gives_the_same_tokenizer(tokenizer, corpus):
    again = train_tokenizer(iter(corpus), vocab_size=VOCAB_SIZE)

    assert again.to_str() == tokenizer.to_str()


def test_training_compresses(tokenizer, corpus):
    tokens = sum(map(len, encode_documents(tokenizer, corpus)))

    assert tokens < 0.6 * sum(len(text.encode()) for text in corpus)


def test_a_vocabulary_that_cannot_be_had_is_refused(corpus):
    with pytest.raises(ValueError, match=f"vocab_size 256 .*--vocab-size {MIN_VOCAB_SIZE}"):
        train_tokenizer(corpus, vocab_size=256)
    with pytest.raises(ValueError, match=r"vocab_size 5000 cannot be filled.*258 tokens.*add more"):
        train_tokenizer(["ab ab"], vocab_size=5000)
    assert train_tokenizer(["ab ab"], vocab_size=258).get_vocab_size() == 258


def test_transformers_loads_it_and_agrees(tokenizer, saved):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(saved)

    assert len(loaded) == VOCAB_SIZE
    assert {loaded.bos_token, loaded.eos_token, loaded.pad_token} == {END_OF_TEXT}
    assert loaded.eos_token_id == get_eod_id(tokenizer)
    for text in TEXTS:
        assert loaded.decode(loaded(text).input_ids) == text
        if END_OF_TEXT not in text:
            assert [loaded(text).input_ids + [loaded.eos_token_id]] == encode_documents(
                tokenizer, [text]
            )


def test_megatron_loads_it_and_agrees(tokenizer, saved):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    loaded = build_tokenizer(
        Namespace(
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(saved),
            metadata_path=None,
            chat_template=None,
            vocab_file=None,
            merge_file=None,
            special_tokens=None,
            tokenizer_hf_no_use_fast=False,
            tokenizer_hf_no_include_special_tokens=False,
            trust_remote_code=False,
            pad_vocab_size=True,
            padded_vocab_size=None,
            make_vocab_size_divisible_by=128,
            tensor_model_parallel_size=1,
            rank=0,
        )
    )

    assert loaded.vocab_size == VOCAB_SIZE
    assert loaded.eod == loaded.eos == loaded.bos == loaded.pad == get_eod_id(tokenizer)
    text = TEXTS[4]
    assert encode_documents(tokenizer, [text]) == [[*loaded.tokenize(text), loaded.eod]]
    assert loaded.detokenize(loaded.tokenize(text)) == text


@pytest.fixture
def model(saved, tmp_path):
    """A model's folder whose tokenizer may be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


@pytest.mark.parametrize("is_dict", [False, True])
def test_a_given_tokenizer_encodes_as_the_one_that_was_saved(tokenizer, model, is_dict):
    if is_dict:
        token = {"__type": "AddedToken", "content": END_OF_TEXT, "special": True}
        edit_json(model / "tokenizer_config.json", eos_token=token)

    given = load_tokenizer(model)

    assert given.eos_token == END_OF_TEXT
    assert given.vocab_size == VOCAB_SIZE
    expected = encode_documents(tokenizer, TEXTS)
    assert encode_documents(given.tokenizer, TEXTS, eos_token=given.eos_token) == expected


@pytest.mark.parametrize("is_special", [True, False])
def test_a_document_is_neither_framed_nor_cut_nor_filled(model, is_special):
    path = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    plain = Tokenizer.from_file(str(path))
    added = ["<|eos|>", "<|bos|>"]
    (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 701), ("<|eos|>", 700)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    tokenizer.save(str(path))
    edit_json(model / "tokenizer_config.json", eos_token="<|eos|>")
    texts = [*TEXTS, "ends <|eos|><|eos|> twice"]

    given = load_tokenizer(model)
    encoded = encode_documents(given.tokenizer, texts, eos_token=given.eos_token)

    assert given.vocab_size == VOCAB_SIZE + 2
    expected = encode_documents(plain, texts)  # ended by <|endoftext|>, id 0
    assert encoded == [[*ids[:-1], 700] for ids in expected]


def test_unused_ids_count_as_tokens(model):
    path = model / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["model"]["vocab"]["e"] = 70_000
    path.write_text(json.dumps(values), "utf-8")

    given = load_tokenizer(model)

    assert given.tokenizer.get_vocab_size() == VOCAB_SIZE
    assert given.vocab_size == 70_001


def test_the_files_of_a_tokenizer_are_copied_and_no_others(model, tmp_path):
    ours = ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt"]
    others = [
        *("config.json", "generation_config.json", "modeling_x.py", "README.md", "LICENSE"),
        *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.pt"),
        *("x.gguf", ".gitattributes"),
    ]
    for name in [*ours, *others]:
        (model / name).write_text(f"content of {name}")
    (model / "original").mkdir()
    blob = (model / "tokenizer.json").rename(tmp_path / "blob")  # as in the hub's cache
    (model / "tokenizer.json").symlink_to(blob)
    copy = tmp_path / "copy"

    copy_tokenizer(load_tokenizer(model), copy)

    names = sorted([*ours, "tokenizer.json", "tokenizer_config.json"])
    assert sorted(path.name for path in copy.iterdir()) == names
    assert not any(path.is_symlink() for path in copy.iterdir())
    for name in names:
        assert (copy / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_changes_is_noticed(model, tmp_path, name):
    given = load_tokenizer(model)
    if name == "tokenizer.json":
        (model / name).write_bytes((model / name).read_bytes() + b"\n")
    else:
        edit_json(model / name, eos_token="e")

    with pytest.raises(ValueError, match=f"tokenizer {model} changed while it was read"):
        copy_tokenizer(given, tmp_path / "copy")


def test_a_tokenizer_that_is_not_there_is_named(model):
    with pytest.raises(ValueError, match=r"nowhere is not an existing folder; pass --tokenizer"):
        load_tokenizer(model / "nowhere")
    with pytest.raises(ValueError, match=r"tokenizer.json is not an existing folder"):
        load_tokenizer(model / "tokenizer.json")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (model / name).unlink()
        with pytest.raises(ValueError, match=f"{model}: {name} cannot be read .*--tokenizer with"):
            load_tokenizer(model)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {}}'])
def test_a_tokenizer_that_does_not_load_is_named(model, content):
    (model / "tokenizer.json").write_bytes(content)

    with pytest.raises(ValueError, match=f"{model}: tokenizer.json cannot be loaded .*again"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a JSON object .*; copy or download it again"),
        (b"[]", "is not a JSON object"),
        (b'{"eos_token": "\xff"}', "is not a JSON object"),
        (b"{}", r"names no eos_token \(None\).*; add it"),
        (b'{"eos_token": null}', r"names no eos_token \(None\)"),
        (b'{"eos_token": {"special": true}}', r"names no eos_token \(None\)"),
        (b'{"eos_token": 2}', r"names no eos_token \(2\)"),
    ],
)
def test_an_end_of_text_that_is_not_named_is_refused(model, content, reason):
    (model / "tokenizer_config.json").write_bytes(content)

    with pytest.raises(ValueError, match=f"{model}: tokenizer_config.json {reason}"):
        load_tokenizer(model)


def test_an_end_of_text_without_an_id_of_its_own_is_refused(model):
    edit_json(model / "tokenizer_config.json", eos_token="</s>")
    with pytest.raises(ValueError, match="eos_token '</s>' .* is not in the vocabulary .*; set"):
        load_tokenizer(model)
    edit_json(model / "tokenizer_config.json", eos_token="e")  # any text has it
    with pytest.raises(ValueError, match="characters 'e' inside a text become the end-of-text"):
        load_tokenizer(model)
