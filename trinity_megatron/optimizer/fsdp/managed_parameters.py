"""The parameters that Megatron-FSDP manages: where this rank's shard of each lies.

Megatron-FSDP gathers parameters in buckets, cuts every bucket into one equal shard for each rank of
a sharding group, and keeps three flat shards: of the weights that are computed with, of the fp32
masters, and of the gradients.  All three are cut alike, and no cut falls inside a matrix of a stack
of experts: buckets are padded to multiples of a row of the first dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ManagedParameter:
    """One parameter of a chunk that Megatron-FSDP wraps.

    Attributes:
        name: In the wrapped chunk.
        raw: The parameter of the model, of its whole shape; its storage comes and goes.
        distributed: What the module holds instead of it outside of the passes, a DTensor.
        group: Megatron's ``ParameterGroup``, which has the buffers.
        item: Number of the parameter there.
    """

    name: str
    raw: torch.nn.Parameter
    distributed: torch.nn.Parameter
    group: Any
    item: int

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to routed experts, which have sharding groups of their own."""
        return bool(self.group.is_expert_param)

    @property
    def bucket(self) -> tuple[int, int]:
        """First and last element of its bucket: a bucket is a buffer of its own."""
        return 0, self._layout.bucket_index.size

    @property
    def bucket_offset(self) -> int:
        """First element of the parameter in its bucket."""
        return int(self._layout.item_index_map[self.item].global_data_index)

    @property
    def start(self) -> int:
        """First element of this rank's shard in the flattened parameter."""
        return int(self._layout._get_item_slice_in_shard(self.item)[0])

    def weight(self) -> Tensor:
        """This rank's shard of the weight that is computed with, flat, in the model's dtype."""
        return self.group.model_weight_buffer.get_item(self.item, only_shard=True)

    def master(self) -> Tensor:
        """This rank's shard of the weight that the optimizer updates, flat."""
        return self._layout.get_item(self.item, only_shard=True)

    def gradient(self) -> Tensor:
        """This rank's shard of the reduced gradient, flat, in the dtype it is reduced in."""
        return self.group.main_grad_buffer.get_item(self.item, only_shard=True)

    @property
    def has_masters(self) -> bool:
        """Whether the masters are other tensors than the weights."""
        return self.group.main_weight_buffer is not None

    @property
    def _layout(self) -> Any:
        return self.group.main_weight_buffer or self.group.model_weight_buffer


def managed_parameters(chunk: Any) -> Iterator[ManagedParameter]:
    """Every parameter of a chunk, in the order of Megatron's buckets.

    Args:
        chunk: Megatron's ``FullyShardedDataParallel``.
    """
    buffer = chunk.param_and_grad_buffer
    for name, distributed in buffer.optimizer_named_parameters:
        raw = distributed.orig_param
        group = buffer.parameter_groups[buffer.param_to_param_group[raw]]
        item = group.model_weight_buffer.param_idx[raw]
        yield ManagedParameter(name, raw, distributed, group, item)


def sharding_ranks(chunk: Any, *, is_expert: bool) -> list[list[int]]:
    """Which ranks of the world hold the shards of a parameter, in the order of the shards.

    Args:
        chunk: Megatron's ``FullyShardedDataParallel``.
        is_expert: Whether the parameter belongs to routed experts.

    Returns:
        One list for each replica of the shards: several with hybrid sharding, one where the
        optimizer's state is sharded over the replicas too.
    """
    index = chunk.megatron_fsdp_dist_index
    inner = torch.distributed.get_process_group_ranks(index.get_fsdp_group(is_expert))
    if not index.use_hybrid_fsdp:
        return [inner]
    whole = torch.distributed.get_process_group_ranks(index.get_dp_group(is_expert))
    # The groups of all replicas have one size, and Megatron numbers replicas first.
    replicas = [whole[start : start + len(inner)] for start in range(0, len(whole), len(inner))]
    assert inner in replicas, f"{inner} is no part of {whole}"
    if index.hsdp_outer_dp_shard:
        return [[rank for same in zip(*replicas, strict=True) for rank in same]]
    return replicas
