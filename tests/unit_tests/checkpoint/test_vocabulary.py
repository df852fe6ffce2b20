"""Rows of the embedding that no token has are left out of an export."""

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import AfmoeForCausalLM

from tests.reference.hf_random import random_config, random_model, random_tokens, read_tensors
from trinity_megatron.checkpoint import load_hf_model, save_hf_model
from trinity_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from trinity_megatron.checkpoint.hf_export import write_hf
from trinity_megatron.checkpoint.model_args import config_from_args
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.transformers_model import load_transformers_model
from trinity_megatron.checkpoint.vocabulary import find_vocab_size

pytestmark = pytest.mark.usefixtures("one_rank")

TOKENS, ROWS = 90, 128


@pytest.fixture
def padded(tmp_path: Path) -> tuple[Path, AfmoeForCausalLM]:
    """A Megatron checkpoint with 128 rows that did not begin as a Hugging Face one; its model."""
    config = random_config(2)
    config.vocab_size = ROWS
    twin = random_model(config, 2).eval()
    twin.save_pretrained(tmp_path / "padded_hf")
    hf_to_megatron(tmp_path / "padded_hf", tmp_path / "megatron")
    for file in (tmp_path / "megatron" / "hf").iterdir():
        file.unlink()
    return tmp_path / "megatron", twin


def write_tokenizer(folder: Path, vocabulary: dict[str, int], *added: str) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    tokenizer.add_special_tokens([AddedToken(token) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def words(number: int) -> dict[str, int]:
    return {f"word{index}": index for index in range(number)}


def assert_unpadded(hf: Path, twin: AfmoeForCausalLM) -> None:
    assert json.loads((hf / "config.json").read_text())["vocab_size"] == TOKENS
    tensors = read_tensors(hf)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(tensors[name], twin.state_dict()[name][:TOKENS])
    exported = AfmoeForCausalLM.from_pretrained(hf, experts_implementation="eager").eval()
    twin.set_experts_implementation("eager")
    config = random_config(2)
    config.vocab_size = TOKENS
    tokens = random_tokens(config, 3)
    with torch.no_grad():
        logits = exported(tokens).logits
        expected = twin(tokens).logits[..., :TOKENS]
    assert logits.shape[-1] == TOKENS
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_run_says_how_many_tokens_it_has(
    padded: tuple[Path, AfmoeForCausalLM], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = TorchDistReader(padded[0])
    config = config_from_args(source.args, tokenizer_vocab_size=TOKENS)
    with caplog.at_level(logging.INFO):
        write_hf(source, config, tmp_path / "hf", name="run")
    assert f"{ROWS - TOKENS} rows of embeddings beyond vocab_size={TOKENS}" in caplog.text
    assert_unpadded(tmp_path / "hf", padded[1])
    # There and back without padding.
    hf_to_megatron(tmp_path / "hf", tmp_path / "again")
    megatron_to_hf(tmp_path / "again", tmp_path / "back")
    assert read_tensors(tmp_path / "back").keys() == read_tensors(tmp_path / "hf").keys()


def test_a_tokenizer_says_it_of_earlier_checkpoints(
    padded: tuple[Path, AfmoeForCausalLM], tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", words(TOKENS - 1), "<added>")
    megatron_to_hf(padded[0], tmp_path / "hf", tokenizer=tokenizer)
    assert_unpadded(tmp_path / "hf", padded[1])


def test_rows_stay_where_nobody_knows(
    padded: tuple[Path, AfmoeForCausalLM], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    megatron_to_hf(padded[0], tmp_path / "hf")
    assert "does not say how many of its 128 rows" in caplog.text
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == ROWS


def test_a_tokenizer_with_more_tokens_than_rows(
    padded: tuple[Path, AfmoeForCausalLM], tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", words(ROWS + 1))
    with pytest.raises(ValueError, match="has 129 tokens, but .* has 128 rows"):
        megatron_to_hf(padded[0], tmp_path / "hf", tokenizer=tokenizer)
    assert not (tmp_path / "hf").exists()


def test_no_padding_row_is_generated(padded: tuple[Path, AfmoeForCausalLM]) -> None:
    source = TorchDistReader(padded[0])
    config = config_from_args(source.args, tokenizer_vocab_size=TOKENS)
    model = load_transformers_model(source, config, name="run")
    assert model.config.vocab_size == TOKENS
    with torch.no_grad():
        assert model(torch.zeros(1, 2, dtype=torch.int64)).logits.shape[-1] == TOKENS


def test_models_in_memory(padded: tuple[Path, AfmoeForCausalLM], tmp_path: Path) -> None:
    model = load_hf_model(tmp_path / "padded_hf")
    model.config.tokenizer_vocab_size = TOKENS
    save_hf_model(model, tmp_path / "hf")
    assert_unpadded(tmp_path / "hf", padded[1])
    assert model.config.vocab_size == ROWS
    # A model that does not know, and its tokenizer.
    model.config.tokenizer_vocab_size = None
    tokenizer = write_tokenizer(tmp_path / "tokenizer", words(TOKENS))
    save_hf_model(model, tmp_path / "hf2", tokenizer=tokenizer)
    assert_unpadded(tmp_path / "hf2", padded[1])


@pytest.mark.parametrize(
    ("saved", "vocabulary", "expected"),
    [
        ({"tokenizer_vocab_size": 513, "padded_vocab_size": 640}, words(100), 513),
        ({"padded_vocab_size": 640}, words(513), 513),
        ({"padded_vocab_size": 640}, words(640), 640),
        ({"padded_vocab_size": 640}, words(512), None),  # pads to 512: another tokenizer
        ({"padded_vocab_size": 640}, {"a": 0, "b": 520}, 521),  # ids with a gap
        ({"padded_vocab_size": 768, "tensor_model_parallel_size": 2}, words(513), 513),
        ({"padded_vocab_size": 520, "make_vocab_size_divisible_by": 8}, words(513), 513),
        ({"padded_vocab_size": 700}, words(513), None),  # --padded-vocab-size of the user
        ({}, words(513), None),
    ],
)
def test_find_vocab_size(
    saved: dict[str, Any], vocabulary: dict[str, int], expected: int | None, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", vocabulary)
    assert find_vocab_size(Namespace(**saved), tokenizer) == expected


def test_tokens_that_only_transformers_adds_count(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", words(513))
    added = {"added_tokens_decoder": {"3": {"content": "word3"}, "519": {"content": "<extra>"}}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(added))
    assert find_vocab_size(Namespace(padded_vocab_size=640), tokenizer) == 520


def test_without_a_tokenizer(tmp_path: Path) -> None:
    assert find_vocab_size(Namespace(padded_vocab_size=640), None) is None
    assert find_vocab_size(Namespace(padded_vocab_size=640), tmp_path) is None
