"""Megatron's distributed optimizer on the shards that Megatron-FSDP keeps.

Weights, masters and gradients lie in the buffers of Megatron-FSDP.  The optimizer gets this rank's
flat shards of them, just as it gets those of Megatron's own buffers without FSDP: norms, clipping,
Muon, AdamW and checkpoints are the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from torch import Tensor

from trinity_megatron.optimizer.fsdp.managed_parameters import ManagedParameter, sharding_ranks
from trinity_megatron.optimizer.sharded.distributed_optimizer import (
    ADAM_STATE_KEYS,
    BufferEntry,
    ShardedOptimizer,
)

# What the optimizer asks a shard for, read from the parameter of the model.
_COPIED = (
    "allreduce",
    "expert_tp",
    "gradient_group",
    "muon_split",
    "partition_dim",
    "partition_stride",
    "sequence_parallel",
    "shared",
    "tensor_model_parallel",
)


class FsdpOptimizer(ShardedOptimizer):
    """One optimizer of a chain, around `Muon` or AdamW.

    Args:
        optimizer: Built on the parameters of the model; gets the shards in their place.
        config: Megatron's ``OptimizerConfig``.
        init_state: Makes the state of all parameters.
        chunks: Megatron's ``FullyShardedDataParallel``.
        managed: Their parameters; those of other optimizers may be among them.
        instance: Number of the replica of the shards that this rank belongs to.
        shards_replicas: Whether the state is sharded over the replicas too.
    """

    has_replicas = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: Any,
        init_state: Callable[..., None],
        *,
        chunks: Sequence[Any],
        managed: Sequence[ManagedParameter],
        instance: int,
        shards_replicas: bool,
    ) -> None:
        super().__init__(
            optimizer,
            config,
            None,
            init_state,
            per_model_buffers={},
            model_chunks=list(chunks),
            data_parallel_group=None,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=0,
            distributed_optimizer_instance_id=instance,
        )
        # From here on all is as without FSDP: shards of masters, which this rank alone updates.
        given = chunks[0].ddp_config
        instances = given.num_distributed_optimizer_instances
        self.ddp_config: Any = replace(
            given,
            use_megatron_fsdp=False,
            num_distributed_optimizer_instances=1 if shards_replicas else instances,
        )
        self.managed: dict[Tensor, ManagedParameter] = {each.raw: each for each in managed}
        self.shards: dict[Tensor, torch.nn.Parameter] = {}
        self.model_param_group_index_map: dict[Tensor, tuple[int, int]] = {}
        self._take_shards()
        self.model_float16_groups: list[list[Tensor]] = []
        self.shard_float16_groups: list[list[Tensor]] = []
        self.shard_fp32_from_float16_groups: list[list[Tensor]] = []
        self.model_fp32_groups = [list(self.shards)]
        self.shard_fp32_groups = [list(self.shards.values())]
        self.gbuf_ranges: list[Any] = []
        self.buffers: list[Any] = []

    def _take_shards(self) -> None:
        """Give the optimizer this rank's shards of the masters instead of the parameters."""
        self.all_parameters: list[Tensor] = []
        for number, group in enumerate(self.optimizer.param_groups):
            self.all_parameters += group["params"]
            shards: list[torch.nn.Parameter] = []
            for param in group["params"]:
                master = self.managed[param].master()
                if not master.numel():
                    continue
                shard = torch.nn.Parameter(master)
                for name in _COPIED:
                    if hasattr(param, name):
                        setattr(shard, name, getattr(param, name))
                self.model_param_group_index_map[param] = number, len(shards)
                self.shards[param] = shard
                shards.append(shard)
            group["params"] = shards

    def shard_ranks(self, groups: Any) -> list[list[int]]:
        return sharding_ranks(self.model_chunks[0], is_expert=self.is_expert)

    def entries(self) -> Iterator[BufferEntry]:
        for param in self.all_parameters:
            each = self.managed[param]
            yield BufferEntry(param, each.bucket_offset, each.bucket, self.shards.get(param))

    def _local_shards(self) -> Iterator[tuple[Tensor, int]]:
        for param in self.shards:
            yield param, self.managed[param].start

    def described_parameters(self, model_state: dict[str, Any]) -> dict[Tensor, Any]:
        found: dict[Tensor, Any] = {}
        for chunk in self.model_chunks:
            found.update(chunk.described_parameters)
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; the state exists before, which Megatron would make after its own buffers."""
        if not self.optimizer.state:
            self.init_state()
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of all shards, of zeros."""
        if self.optimizer_state_keys != ADAM_STATE_KEYS:
            self.init_state_fn(self.optimizer, self.config)
            return
        for group in self.optimizer.param_groups:
            for shard in group["params"]:
                state = {key: torch.zeros_like(shard) for key in ADAM_STATE_KEYS}
                self.optimizer.state[shard] = {"step": torch.zeros(()), **state}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the shards; those of the buffers are of the chunks."""
        for shard in self.shards.values():
            shard.grad = None

    def _copy_model_grads_to_main_grads(self) -> None:
        for param, shard in self.shards.items():
            shard.grad = self.managed[param].gradient().to(shard.dtype)

    def _copy_main_params_to_model_params(self) -> None:
        """Once for all optimizers of the chain, see `optimizer_chain`."""

    def _copy_main_params_to_param_buffer(self) -> None:
        """The same."""

    @torch.no_grad()
    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        for param, shard in self.shards.items():
            if self.managed[param].has_masters:
                shard.copy_(self.managed[param].weight())

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        # Without Megatron's gathering of weights, which the chain starts.
        return bool(MixedPrecisionOptimizer.step_with_ready_grads(self))
