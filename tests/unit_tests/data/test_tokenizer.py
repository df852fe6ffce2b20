"""The byte-level BPE tokenizer."""

from argparse import Namespace

import pytest

from tests.unit_tests.data.tokenizer_cases import TEXTS, VOCAB_SIZE
from trinity_megatron.data.tokenizer import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    encode_documents,
    get_eod_id,
    train_tokenizer,
)


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
    with pytest.raises(ValueError, match=r"vocab_size 5000 cannot be filled.*260 tokens.*add more"):
        train_tokenizer(["ab ab"], vocab_size=5000)
    assert train_tokenizer(["ab ab"], vocab_size=260).get_vocab_size() == 260


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
