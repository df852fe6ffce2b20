"""Megatron models in memory: construction, and access to their tensors as a checkpoint source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from trinity_megatron.checkpoint.source import Tensors
from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.model.config import TrinityConfig

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.models.gpt import GPTModel


class LiveModel:
    """A :class:`MegatronSource` over a model that lies unsharded in this process.

    Args:
        model: Megatron's model.
    """

    def __init__(self, model: GPTModel) -> None:
        self._shards: dict[str, dict[tuple[int, ...], ShardedTensor]] = {}
        for shard in sharded_tensors(model):
            self._shards.setdefault(shard.key, {})[shard.global_offset] = shard

    def model_tensors(self) -> Tensors:
        """Dtype and unsharded shape of every tensor."""
        firsts = {key: next(iter(shards.values())) for key, shards in self._shards.items()}
        return {key: (shard.dtype, shard.global_shape) for key, shard in firsts.items()}

    def parts(self, key: str) -> list[list[Part]]:
        """The shards of a tensor, one in each list: none is split into columns."""
        shards = self._shards[key].items()
        return [
            [Part(key, start, tuple(with_prepended_axes(shard).shape))] for start, shard in shards
        ]

    def read(self, parts: Sequence[Part]) -> torch.Tensor:
        """The values of a shard, on the CPU."""
        (part,) = parts
        return with_prepended_axes(self._shards[part.key][part.start]).detach().cpu()


def sharded_tensors(model: GPTModel) -> Iterator[ShardedTensor]:
    """The shards of this process, as Megatron saves them to a distributed checkpoint."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value


def with_prepended_axes(shard: ShardedTensor) -> torch.Tensor:
    """The data of a shard with the leading axes of the unsharded tensor."""
    assert shard.data is not None
    return shard.data[(None,) * shard.prepend_axis_num]


def build_model(config: TrinityConfig) -> GPTModel:
    """Build Megatron's model with uninitialized weights.

    Initializes the default process group (for this process alone) and Megatron's parallel state
    (from the config) if they are not initialized.
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
