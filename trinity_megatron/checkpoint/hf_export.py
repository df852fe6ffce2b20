"""Writing Megatron's tensors as a Hugging Face checkpoint."""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from trinity_megatron.checkpoint.block_stream import BlockWriter, write_blocks
from trinity_megatron.checkpoint.hf_assets import Assets, write_generation_config, write_tokenizer
from trinity_megatron.checkpoint.hf_weights import INDEX_NAME, SINGLE_NAME, parse_header
from trinity_megatron.checkpoint.hf_writer import (
    HFWriter,
    build_header,
    build_index,
    split_into_files,
)
from trinity_megatron.checkpoint.model_card import write_lineage
from trinity_megatron.checkpoint.source import MegatronSource, Tensors
from trinity_megatron.checkpoint.tensor_checks import match_tensors
from trinity_megatron.checkpoint.vocabulary import check_tokenizer_size
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import CONFIG_NAME, hf_config_from_trinity

MAX_SHARD_SIZE = "5GB"


class Encoding(Protocol):
    """How tensors are stored in the files, where that is not as Megatron has them."""

    name: str

    def stored(self, tensors: Tensors) -> Tensors:
        """Dtype and shape of the tensors in the files, from those of the model."""

    def config_fields(self, tensors: Tensors) -> dict[str, Any]:
        """What ``config.json`` says of it."""

    def wrap(self, writer: HFWriter) -> BlockWriter:
        """A writer that takes the blocks of the model's tensors."""


def write_hf(
    source: MegatronSource,
    config: TrinityConfig,
    hf: Path,
    *,
    name: str,
    assets: Assets | None = None,
    tokenizer: Path | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    fingerprint: Any = None,
    encoding: Encoding | None = None,
    seq_length: int | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> int:
    """Write Megatron's tensors as a Hugging Face checkpoint.

    Args:
        source: Source of the tensors.
        config: Config of the model.
        hf: Folder to create.
        name: Name of the source in messages.
        assets: Files of the Hugging Face checkpoint that training started from.
        tokenizer: Folder of the tokenizer; takes precedence over the one in ``assets``.
        max_shard_size: Largest weight file, e.g. ``5GB``.
        fingerprint: Identifies the content of the source.  If None, an interrupted conversion
            starts over.
        encoding: How the weights are stored; as they are if None.
        seq_length: Tokens of a sequence of the training, which the model can read.
        lineage: Where the run comes from, for the model card.

    Returns:
        Bytes of weights read.

    Raises:
        UserError: The tensors do not match the config, or a tensor contains NaN or infinity.
        OSError: The folder cannot be written.
    """
    found = source.model_tensors()
    entries = match_tensors(found, config, assets=assets, name=name)
    if tokenizer is not None:
        check_tokenizer_size(tokenizer, config.vocab_size, name)
    tensors: Tensors = {
        hf_name: (torch.float32 if entry.keep_fp32 else found[entry.megatron][0], shape)
        for entry in entries
        for hf_name, shape in entry.hf.items()
    }
    extra = encoding.config_fields(tensors) if encoding else {}
    stored = encoding.stored(tensors) if encoding else tensors
    headers = _build_headers(stored, assets, max_shard_size)

    known = assets.config.get("max_position_embeddings") if assets is not None else None
    if known and seq_length and seq_length > known:  # a context extension
        extra = {**extra, "max_position_embeddings": seq_length}

    def prepare(folder: Path) -> BlockWriter:
        # These files before the weights, so that errors in them appear at once.
        _write_side_files(folder, config, stored, headers, assets, tokenizer, extra)
        if lineage is not None:
            write_lineage(folder, lineage)
        writer = HFWriter(folder, headers)
        return encoding.wrap(writer) if encoding else writer

    # A model in memory may have changed since an earlier attempt: a random ID discards its files.
    state = [fingerprint or uuid.uuid4().hex, headers, encoding.name if encoding else None]
    return write_blocks(
        source,
        entries,
        hf,
        name=name,
        state=state,
        prepare=prepare,
        description="to Hugging Face",
    )


def _build_headers(tensors: Tensors, assets: Assets | None, max_shard_size: str) -> dict[str, str]:
    """JSON header of each file: the original headers if names, dtypes and shapes are unchanged."""
    if assets is not None:
        known = {
            name: (info.dtype, info.shape)
            for file, header in assets.headers.items()
            for name, info in parse_header(file, header).items()
        }
        if known == tensors:
            return assets.headers
    files = split_into_files(tensors, max_shard_size=max_shard_size)
    return {
        file: build_header({name: tensors[name] for name in names}) for file, names in files.items()
    }


def _write_side_files(
    folder: Path,
    config: TrinityConfig,
    tensors: Tensors,
    headers: dict[str, str],
    assets: Assets | None,
    tokenizer: Path | None,
    extra: Mapping[str, Any],
) -> None:
    """Write config, tokenizer, generation config and index: every file except the weights."""
    dtype = tensors["lm_head.weight"][0]
    ids: dict[str, int] = {}
    if assets is not None:
        assets.copy_files(folder)
    if tokenizer is not None:
        ids = write_tokenizer(tokenizer, folder)
    elif assets is None:
        write_generation_config(folder, {})
    fields = (
        dict(assets.config) if assets is not None else hf_config_from_trinity(config, dtype=dtype)
    )
    fields.update(ids, **extra)
    for key in ("dtype", "torch_dtype"):  # training may have changed the dtype of the weights
        if fields.get(key):
            fields[key] = str(dtype).removeprefix("torch.")
    if assets is None or fields != assets.config:
        (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    is_original = assets is not None and headers is assets.headers
    if not is_original:
        (folder / INDEX_NAME).unlink(missing_ok=True)
        if list(headers) != [SINGLE_NAME]:
            (folder / INDEX_NAME).write_text(build_index(headers), encoding="utf-8")
