"""Loading checkpoints of either format into a Megatron model, and saving a model."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trinity_megatron.checkpoint.hf_export import write_hf
from trinity_megatron.checkpoint.hf_weights import HFWeights
from trinity_megatron.checkpoint.live_model import (
    LiveModel,
    build_model,
    sharded_tensors,
    with_prepended_axes,
)
from trinity_megatron.checkpoint.model_args import config_from_args
from trinity_megatron.checkpoint.param_mapping import resolve, resolve_momentum
from trinity_megatron.checkpoint.tensor_checks import check_finite, check_hf_tensors
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader, advise_other
from trinity_megatron.checkpoint.vocabulary import find_vocab_size, get_vocabulary_rows
from trinity_megatron.errors import UserError
from trinity_megatron.model.hf_config import read_hf_config, trinity_config_from_hf

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.models.gpt import GPTModel


def load_hf_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> GPTModel:
    """Load a Hugging Face checkpoint into a Megatron model in this process, without a launcher.

    The model is on the GPU if there is one, else on the CPU.  ``model(tokens, position_ids, None)``
    with int64 ``[b, s]`` arguments returns logits ``[b, s, vocab]``.

    Args:
        path: Folder with ``config.json`` and safetensors files.
        dtype: Dtype of the weights; the expert bias stays in fp32.

    Raises:
        UserError: The model is not supported, or the checkpoint is incomplete or damaged.
    """
    config = trinity_config_from_hf(read_hf_config(Path(path)), **_precision_fields(dtype))
    weights = HFWeights(Path(path))
    config.tokenizer_vocab_size = config.vocab_size
    entries = resolve(config, stacked_experts=weights.has_stacked_experts)
    check_hf_tensors(weights, entries)
    model = build_model(config)
    shards: dict[str, list[ShardedTensor]] = {}
    for shard in sharded_tensors(model):
        shards.setdefault(shard.key, []).append(shard)
    reader = weights.reader()
    with torch.no_grad():
        for entry in entries:
            for shard in shards.pop(entry.megatron):
                target, start = with_prepended_axes(shard), shard.global_offset
                blocks = entry.clip(start, tuple(target.shape))
                for block in blocks:
                    block.megatron_view(target, start).copy_(reader.read(block))
                check_finite(target, blocks, start, str(path))
        for entry in resolve_momentum(config):
            for shard in shards.pop(entry.megatron):
                assert shard.data is not None
                shard.data.zero_()
    assert not shards, f"not in the checkpoint: {sorted(shards)}"
    return model


def save_hf_model(
    model: torch.nn.Module, path: str | Path, *, tokenizer: str | Path | None = None
) -> None:
    """Save an unsharded Megatron model as a Hugging Face checkpoint.

    Args:
        model: Megatron's model, as :func:`load_hf_model` returns it.  Embedding rows beyond
            ``config.tokenizer_vocab_size`` are not saved.
        path: Folder to create.
        tokenizer: Folder of the tokenizer to copy.

    Raises:
        UserError: The model is sharded over ranks, contains NaN or infinity, or transformers has no
            such model.
        OSError: The folder cannot be written.
    """
    from megatron.core.utils import unwrap_model

    whole = unwrap_model(model)
    config = copy.copy(whole.config)
    for size in ("tensor", "pipeline", "expert"):
        name = f"{size}_model_parallel_size"
        if getattr(config, name) > 1:
            raise UserError(
                f"{name}={getattr(config, name)}: this process holds a part of the model. Remedy: "
                "save a torch_dist checkpoint, then trinity-megatron convert --from-megatron."
            )
    folder = Path(tokenizer) if tokenizer is not None else None
    state = argparse.Namespace(
        tokenizer_vocab_size=config.tokenizer_vocab_size, padded_vocab_size=config.vocab_size
    )
    config.tokenizer_vocab_size = find_vocab_size(state, folder)
    write_hf(LiveModel(whole), config, Path(path), name="the model", tokenizer=folder)


def load_megatron_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, **layout: Any
) -> GPTModel:
    """Load a ``torch_dist`` checkpoint into a Megatron model.

    Args:
        path: Value of ``--save``, or the folder of one iteration.
        dtype: Dtype of the weights; the expert bias stays in fp32.
        **layout: Config fields of a parallel layout, e.g. ``tensor_model_parallel_size=2``.
            Without any, the model is unsharded.

    Raises:
        UserError: The checkpoint is incomplete or damaged, or contains no Trinity model.
    """
    reader = TorchDistReader(Path(path))
    config = config_from_args(reader.args, **_precision_fields(dtype), **layout)
    tp = config.tensor_model_parallel_size
    config.vocab_size = (
        -(-get_vocabulary_rows(reader.model_tensors()) // tp) * tp
    )  # the same rows on every rank
    model = build_model(config)
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    from trinity_megatron.checkpoint.integrity.guarded_load import guarded_loads

    wanted = model.sharded_state_dict()
    names = list(wanted)
    try:
        with guarded_loads(advise=advise_other):
            state = dist_checkpointing.load(wanted, str(reader.folder))
    except CheckpointException as error:
        reason = str(error).splitlines()[-1]
        raise UserError(f"{reader.folder} does not fit its arguments: {reason}") from error
    model.load_state_dict({name: state[name] for name in names})
    return model


def _precision_fields(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "transformer_impl": "local",
    }
