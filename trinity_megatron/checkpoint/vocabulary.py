"""Rows of the embedding: tokens of the vocabulary and Megatron's padding."""

import argparse
import logging
from pathlib import Path

from trinity_megatron.checkpoint.hf_assets import Assets
from trinity_megatron.checkpoint.source import Tensors
from trinity_megatron.data.given_tokenizer import read_vocab_size
from trinity_megatron.errors import UserError
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import CONFIG_NAME, compare_models, trinity_config_from_hf

logger = logging.getLogger(__name__)


def get_vocabulary_rows(found: Tensors) -> int:
    """Number of embedding rows, padding included; 0 without an embedding.

    Args:
        found: Dtype and unsharded shape of every tensor.
    """
    return next((shape[0] for key, (_, shape) in found.items() if "word_embeddings" in key), 0)


def set_vocabulary(config: TrinityConfig, found: Tensors, assets: Assets | None, name: str) -> None:
    """Set ``config.vocab_size`` to the vocabulary without Megatron's padding.

    Args:
        config: Config of the model; changed in place.
        found: Dtype and unsharded shape of every tensor.
        assets: Files of the Hugging Face checkpoint that training started from.
        name: Name of the source in messages.

    Raises:
        UserError: The model differs from that of the assets, or the embedding has too few rows.
    """
    rows = get_vocabulary_rows(found)
    config.vocab_size = rows
    if assets is None:
        _remove_padding(config, rows, name)
        return
    original = trinity_config_from_hf(assets.config)
    if different := compare_models(config, original):
        fields = ", ".join(f"{field}={a!r} (there {b!r})" for field, (a, b) in different.items())
        raise UserError(
            f"{name} is another model than {assets.folder / CONFIG_NAME}: {fields}. Remedy: remove "
            f"{assets.folder} if the model was changed on purpose."
        )
    if original.vocab_size > rows:
        raise UserError(
            f"{name} has {rows} rows of embeddings, fewer than vocab_size={original.vocab_size} in "
            f"{assets.folder / CONFIG_NAME}."
        )
    config.tokenizer_vocab_size = original.vocab_size
    _remove_padding(config, rows, name)


def _remove_padding(config: TrinityConfig, rows: int, name: str) -> None:
    known = config.tokenizer_vocab_size
    if known is None:
        logger.warning(
            "%s does not say how many of its %d rows of embeddings belong to a token: all of them "
            "are kept, Megatron's padding included.",
            name,
            rows,
        )
        return
    if known > rows:
        raise UserError(
            f"{name} has {rows} rows of embeddings, fewer than the {known} tokens that it says it "
            "was trained with."
        )
    if known < rows:
        logger.info(
            "%d rows of embeddings beyond vocab_size=%d are Megatron's padding and left out.",
            rows - known,
            known,
        )
    config.vocab_size = known


def find_vocab_size(args: argparse.Namespace, tokenizer: Path | None) -> int | None:
    """Number of tokens of the vocabulary, i.e. of embedding rows without padding.

    A run stores this number in its checkpoints.  Checkpoints of other training scripts and of
    earlier releases lack it.  For them, the size of the tokenizer is used if Megatron pads that
    size to the number of rows in the checkpoint.

    Args:
        args: Arguments stored in a checkpoint.
        tokenizer: Folder of the tokenizer of the run.

    Returns:
        The number of tokens; None if unknown.
    """
    saved = getattr(args, "tokenizer_vocab_size", None)
    if saved is not None or tokenizer is None or not (tokenizer / "tokenizer.json").is_file():
        return saved
    size = read_vocab_size(tokenizer)
    multiple = getattr(args, "make_vocab_size_divisible_by", 128)
    multiple *= getattr(args, "tensor_model_parallel_size", 1)
    padded = -(-size // multiple) * multiple
    return size if padded == getattr(args, "padded_vocab_size", None) else None


def check_tokenizer_size(tokenizer: Path, rows: int, name: str) -> None:
    """Check that every token has an embedding row.

    Args:
        tokenizer: Folder of the tokenizer.
        rows: Number of embedding rows.
        name: Name of the model in the message.

    Raises:
        UserError: The tokenizer has more tokens than the embedding has rows.
    """
    size = read_vocab_size(tokenizer)
    if size > rows:
        raise UserError(
            f"{tokenizer} has {size} tokens, but {name} has {rows} rows of embeddings. Remedy: "
            "--tokenizer DIR with the tokenizer that the model was trained with."
        )
