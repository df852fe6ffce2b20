"""Rows of the embedding against the tokens of the data."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from trinity_megatron.errors import UserError  # noqa: E402
from trinity_megatron.model.hf_config import hf_config_from_trinity  # noqa: E402
from trinity_megatron.model.presets import trinity_preset  # noqa: E402
from trinity_megatron.training.arguments.vocabulary import check_vocabulary  # noqa: E402


def make_args(**given: Any) -> Namespace:
    """Arguments of a run on one rank."""
    values = {"preset": "tiny", "padded_vocab_size": None, "data": "D", "rank": 0}
    return Namespace(**{**values, "tensor_model_parallel_size": 1, **given})


def data_of(vocab_size: int) -> Any:
    """A manifest of this many tokens."""
    return SimpleNamespace(vocab_size=vocab_size)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """The folder of a checkpoint whose embedding has 510 rows."""
    hf = hf_config_from_trinity(trinity_preset("tiny", vocab_size=510))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return str(tmp_path)


def test_fewer_rows_than_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="--padded-vocab-size 511 .*512.*Remedy: at least 512"):
        check_vocabulary(make_args(padded_vocab_size=511), data_of(512))
    for rows in (512, 1024, None):
        args = make_args(padded_vocab_size=rows)
        check_vocabulary(args, data_of(512))
        assert args.padded_vocab_size == rows


@pytest.mark.parametrize(("tp", "rows"), [(1, 510), (2, 510), (4, 512)])
def test_a_checkpoint_gives_its_rows(tp: int, rows: int, checkpoint: str) -> None:
    args = make_args(preset=checkpoint, tensor_model_parallel_size=tp)
    check_vocabulary(args, data_of(510))
    assert args.padded_vocab_size == rows


def test_more_tokens_than_the_checkpoint_has_rows(checkpoint: str) -> None:
    with pytest.raises(UserError, match="--data D .*511.*--preset .*510.*Remedy: .*tokenizer"):
        check_vocabulary(make_args(preset=checkpoint), data_of(511))
