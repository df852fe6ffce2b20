"""Rows of the embedding: one for each token of tokenizer, data and checkpoint."""

from __future__ import annotations

import argparse
import math

from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.training import global_vars

from trinity_megatron.data.manifest import DataManifest
from trinity_megatron.errors import UserError
from trinity_megatron.model.presets import PRESETS, get_preset
from trinity_megatron.process.screen import tell_once


def check_vocabulary(args: argparse.Namespace, manifest: DataManifest | None) -> None:
    """Refuse fewer rows than ``--data`` has tokens; take those of a checkpoint as ``--preset``.

    Raises:
        UserError: Names the numbers and the remedy.
    """
    if manifest is not None and 0 < (args.padded_vocab_size or 0) < manifest.vocab_size:
        raise UserError(
            f"--padded-vocab-size {args.padded_vocab_size} is below the {manifest.vocab_size} "
            f"tokens of --data. Remedy: at least {manifest.vocab_size}."
        )
    if args.preset not in PRESETS and args.padded_vocab_size is None:
        args.padded_vocab_size = _vocabulary_of_checkpoint(args, manifest)


def set_vocab_size(
    args: argparse.Namespace, manifest: DataManifest | None, rows: int | None
) -> None:
    """Have a row for every token, and remember how many rows a token has.

    Megatron pads the number of tokens, but an id may be beyond it where the vocabulary has gaps.

    Args:
        args: Of the run; its tokenizer is built.
        manifest: Of ``--data``.
        rows: ``--padded-vocab-size``, also by ``--preset DIR``; None if Megatron chose it.

    Raises:
        UserError: There are more tokens than rows.
    """
    in_data = manifest.vocab_size if manifest is not None else 0
    args.tokenizer_vocab_size = max(global_vars.get_tokenizer().vocab_size, in_data)
    if args.tokenizer_vocab_size <= (args.padded_vocab_size or math.inf):
        return
    if rows is not None:
        raise UserError(
            f"--padded-vocab-size {rows} has no row for each of the {args.tokenizer_vocab_size} "
            "tokens of the tokenizer. Remedy: drop the flag, or take the tokenizer of --preset DIR."
        )
    args.padded_vocab_size = vocab_size_with_padding(args.tokenizer_vocab_size, args)


def _vocabulary_of_checkpoint(args: argparse.Namespace, manifest: DataManifest | None) -> int:
    """Rows of the embedding of the checkpoint that ``--preset`` names, even over the ranks."""
    vocab_size = get_preset(args.preset).model["vocab_size"]
    if manifest is not None and manifest.vocab_size > vocab_size:
        raise UserError(
            f"--data {args.data} has a vocabulary of {manifest.vocab_size} tokens, --preset "
            f"{args.preset} one of {vocab_size}. Remedy: trinity-megatron prepare-data --tokenizer "
            "with the tokenizer of the checkpoint."
        )
    tp = args.tensor_model_parallel_size
    padded = -(-vocab_size // tp) * tp
    if padded != vocab_size:
        tell_once(
            f"> vocabulary padded from {vocab_size} to {padded} rows for "
            f"--tensor-model-parallel-size {tp}; the rows that are added take part in the softmax"
        )
    return padded
