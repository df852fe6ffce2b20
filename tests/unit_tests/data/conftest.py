"""A trained tokenizer for the tests of data."""

import sysconfig
from pathlib import Path

import pytest

from tests.unit_tests.data.tokenizer_cases import VOCAB_SIZE
from trinity_megatron.data.tokenizer import (
    save_tokenizer,
    train_tokenizer,
)


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
