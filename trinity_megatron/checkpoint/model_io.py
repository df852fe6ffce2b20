"""Models in memory, filled from a checkpoint of either side."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trinity_megatron.checkpoint.convert import (
    MegatronSource,
    Tensors,
    check_finite,
    check_hf_tensors,
    config_from_args,
    find_vocab_size,
    get_vocabulary_rows,
    match_tensors,
    write_hf,
)
from trinity_megatron.checkpoint.hf_assets import Assets
from trinity_megatron.checkpoint.hf_weights import HFWeights
from trinity_megatron.checkpoint.param_mapping import resolve, resolve_momentum
from trinity_megatron.checkpoint.torch_dist import Part, TorchDistReader, advise_other
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import UserError
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import (
    hf_config_from_trinity,
    plain_rope,
    read_hf_config,
    trinity_config_from_hf,
)

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.models.gpt import GPTModel
    from transformers import AfmoeConfig


def load_hf_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> GPTModel:
    """Megatron's model of a Hugging Face checkpoint, in this process alone.

    Needs no launcher; runs on the GPU if there is one, else on the CPU.  Called with tokens and
    positions (int64 ``[b, s]``) and None for the mask, the model returns logits ``[b, s, vocab]``.

    Args:
        path: Folder with ``config.json`` and safetensors files.
        dtype: Precision of the weights; the expert bias stays in fp32.

    Raises:
        UserError: The model is not supported, or the checkpoint is not complete or damaged.
    """
    config = trinity_config_from_hf(read_hf_config(Path(path)), **_precision(dtype))
    weights = HFWeights(Path(path))
    config.tokenizer_vocab_size = config.vocab_size
    entries = resolve(config, stacked_experts=weights.has_stacked_experts)
    check_hf_tensors(weights, entries)
    model = build_model(config)
    shards: dict[str, list[ShardedTensor]] = {}
    for shard in _sharded_tensors(model):
        shards.setdefault(shard.key, []).append(shard)
    reader = weights.reader()
    with torch.no_grad():
        for entry in entries:
            for shard in shards.pop(entry.megatron):
                target, start = _whole_axes(shard), shard.global_offset
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
    """Write a model that lies whole in this process as a Hugging Face checkpoint.

    Args:
        model: Megatron's model, as :func:`load_hf_model` returns it.  Rows of the embedding beyond
            its ``config.tokenizer_vocab_size`` are left out.
        path: Folder to make.
        tokenizer: Folder of its tokenizer, to copy.

    Raises:
        UserError: The model is cut over ranks, holds NaN, or has no twin in transformers.
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
    """Megatron's model of a ``torch_dist`` checkpoint.

    Args:
        path: What ``--save`` was, or the folder of one iteration.
        dtype: Precision of the weights; the expert bias stays in fp32.
        **layout: Fields of the config for a parallel layout, e.g.
            ``tensor_model_parallel_size=2``; one process without.

    Raises:
        UserError: The checkpoint is not complete or damaged, or no Trinity model.
    """
    reader = TorchDistReader(Path(path))
    config = config_from_args(reader.args, **_precision(dtype), **layout)
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


def load_transformers_model(
    source: MegatronSource,
    config: TrinityConfig,
    *,
    name: str,
    assets: Assets | None = None,
) -> Any:
    """The same model in transformers, in the precision of Megatron's tensors.

    The expert bias stays in fp32.

    Args:
        source: Where they come from.
        config: The model.
        name: Of the source, in messages.
        assets: Files of the Hugging Face checkpoint that it all began with.

    Raises:
        UserError: The tensors are not those of the model.

    Returns:
        transformers' ``AfmoeForCausalLM``.
    """
    from transformers import AfmoeForCausalLM
    from transformers.initialization import no_init_weights

    found = source.model_tensors()
    entries = match_tensors(found, config, assets=assets, name=name, stacked_experts=True)
    dtype = found["output_layer.weight"][0]
    fields = assets.config if assets else hf_config_from_trinity(config, dtype=dtype)
    hf_config = transformers_config({**fields, "dtype": dtype})
    with no_init_weights():
        model = AfmoeForCausalLM._from_config(hf_config, dtype=dtype)
    if (config.hidden_size * dtype.itemsize) % 16 or (
        hf_config.moe_intermediate_size * dtype.itemsize
    ) % 16:
        model.set_experts_implementation("eager")  # the grouped product wants 16 bytes
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for entry in entries:
            if entry.keep_fp32:
                for hf_name in entry.hf:
                    tensors[hf_name].data = tensors[hf_name].data.float()
            for parts in source.parts(entry.megatron):
                whole, start = source.read(parts), parts[0].start
                for block in entry.clip(start, tuple(whole.shape)):
                    target = block.hf_view(tensors[block.hf_name])
                    target.copy_(block.megatron_view(whole, start))
    return model.eval()


def transformers_config(fields: Mapping[str, Any]) -> AfmoeConfig:
    """transformers' configuration of a ``config.json``, in whichever words it states the RoPE."""
    from transformers import AfmoeConfig

    others = {n: value for n, value in fields.items() if n not in ("rope_scaling", "rope_theta")}
    return AfmoeConfig(**{**others, "rope_parameters": plain_rope(fields)})


def build_model(config: TrinityConfig) -> GPTModel:
    """Megatron's model with uninitialised weights.

    Megatron's parallel state is initialised as the config says if it is not there yet, and the
    process group for this process alone.
    """
    enter_host()
    _initialize_parallel_state(config)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from trinity_megatron.model.layer_specs import get_trinity_layer_spec

    return GPTModel(
        config,
        get_trinity_layer_spec(config),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=False,
    )


def _initialize_parallel_state(config: TrinityConfig) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
        )
        model_parallel_cuda_manual_seed(0)


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "transformer_impl": "local",
    }


class LiveModel:
    """A model in memory as a source of Megatron's tensors; what this process holds is all."""

    def __init__(self, model: GPTModel) -> None:
        self._shards: dict[str, dict[tuple[int, ...], ShardedTensor]] = {}
        for shard in _sharded_tensors(model):
            self._shards.setdefault(shard.key, {})[shard.global_offset] = shard

    def model_tensors(self) -> Tensors:
        """Dtype and whole shape of every tensor."""
        firsts = {key: next(iter(shards.values())) for key, shards in self._shards.items()}
        return {key: (shard.dtype, shard.global_shape) for key, shard in firsts.items()}

    def parts(self, key: str) -> list[list[Part]]:
        """The shards of a tensor; never cut into columns."""
        shards = self._shards[key].items()
        return [[Part(key, start, tuple(_whole_axes(shard).shape))] for start, shard in shards]

    def read(self, parts: Sequence[Part]) -> torch.Tensor:
        """The numbers of a shard, on the CPU."""
        (part,) = parts
        return _whole_axes(self._shards[part.key][part.start]).detach().cpu()


def _sharded_tensors(model: GPTModel) -> Iterator[ShardedTensor]:
    """What this process holds of each tensor, as it goes to a distributed checkpoint."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value


def _whole_axes(shard: ShardedTensor) -> torch.Tensor:
    """The data with the leading axes that only the whole tensor has."""
    assert shard.data is not None
    return shard.data[(None,) * shard.prepend_axis_num]
