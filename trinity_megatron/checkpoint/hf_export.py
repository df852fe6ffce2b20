"""Writing Megatron's tensors as a Hugging Face checkpoint."""

import json
import uuid
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from trinity_megatron.checkpoint.hf_assets import Assets, write_generation_config, write_tokenizer
from trinity_megatron.checkpoint.hf_weights import (
    INDEX_NAME,
    SINGLE_NAME,
    HFWriter,
    build_header,
    build_index,
    parse_header,
    split_into_files,
)
from trinity_megatron.checkpoint.source import MegatronSource, Tensors
from trinity_megatron.checkpoint.staging import Staging, group_into_jobs
from trinity_megatron.checkpoint.tensor_checks import check_finite, match_tensors
from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.vocabulary import check_tokenizer_size
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import CONFIG_NAME, hf_config_from_trinity

MAX_SHARD_SIZE = "5GB"


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

    Returns:
        Bytes of weights written.

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
    headers = _build_headers(tensors, assets, max_shard_size)
    by_key = {entry.megatron: entry for entry in entries}
    units = [parts for entry in entries for parts in source.parts(entry.megatron)]

    def num_bytes(parts: Sequence[Part]) -> int:
        return sum(prod(part.shape) for part in parts) * found[parts[0].key][0].itemsize

    batches = group_into_jobs(units, num_bytes)
    sizes = [sum(map(num_bytes, batch)) for batch in batches]
    # A model in memory may have changed since an earlier attempt: a random ID discards its files.
    state = [fingerprint or uuid.uuid4().hex, headers, sizes]
    with Staging(hf, state, num_bytes=sum(sizes)) as staging:
        # Write these files before the weights, so that errors in them appear at once.
        _write_side_files(staging.folder, config, tensors, headers, assets, tokenizer)
        writer = HFWriter(staging.folder, headers)

        def write(index: int, advance: Callable[[int], None]) -> None:
            touched = set()
            for parts in batches[index]:
                whole, start = source.read(parts), parts[0].start
                blocks = by_key[parts[0].key].clip(start, tuple(whole.shape))
                check_finite(whole, blocks, start, f"{name}: {parts[0].key}, to be")
                for block in blocks:
                    writer.write(block, block.megatron_view(whole, start))
                    touched.add(block.hf_name)
                advance(num_bytes(parts))
            writer.sync(touched)

        try:
            staging.run(write, sizes, description="to Hugging Face")
        finally:
            writer.close()
    return sum(sizes)


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
    fields.update(ids)
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
