"""Megatron-FSDP around a Trinity model: what it must leave alone, and how it is saved.

A checkpoint of a sharded run has Megatron's ``torch_dist`` format, the same as without FSDP: each
rank writes its shard of every parameter as boxes of the whole (see `checkpoint_boxes`).  So either
kind of run reads what the other wrote, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from torch import Tensor
from torch.nn import Module

from trinity_megatron.optimizer.fsdp.initialization import initialize_shards
from trinity_megatron.optimizer.fsdp.managed_parameters import (
    ManagedParameter,
    managed_parameters,
)
from trinity_megatron.optimizer.sharded.checkpoint_boxes import collect_boxes, shard_to_boxes
from trinity_megatron.upstream.registry import replaced

_CLASS = "megatron.training.models.dist_utils:FullyShardedDataParallel"


@contextmanager
def trinity_fsdp() -> Iterator[None]:
    """Let Megatron's builders wrap models in `TrinityFSDP` while the block runs."""
    with replaced(_CLASS, lambda _: TrinityFSDP):
        yield


class TrinityFSDP(FullyShardedDataParallel):
    """Megatron's wrapper around a Trinity model; arguments are its own.

    Attributes:
        managed: The parameters that are sharded.
        described_parameters: How each is saved, by the parameter; of the last sharded state dict.
    """

    def __init__(self, config: Any, ddp_config: Any, module: Module, **kwargs: Any) -> None:
        keep_frozen_parameters_whole(module)
        device = torch.device(torch.cuda.current_device())
        super().__init__(config, ddp_config, module, **{"device": device, **kwargs})
        self.managed = list(managed_parameters(self))
        self.described_parameters: dict[Tensor, Any] = {}
        self._views: dict[str, dict[int, Tensor]] = {}
        # It would make weights of the masters before those are loaded.
        self.module._load_state_dict_post_hook.remove()
        # Megatron's checkpoints look through this wrapper at the one inside.
        self.module.sharded_state_dict = self.sharded_state_dict
        self.module.load_state_dict = self.load_state_dict

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """This rank's shards as boxes of the parameters, and all else as without FSDP.

        Args:
            prefix: Of the keys.
            sharded_offsets: Megatron's; of a model that is part of another.
            metadata: Megatron's.

        Returns:
            By key of the parameter its boxes by number, or a ``ShardedTensor`` of what is not
            sharded.
        """
        inner = self.module.module
        state = inner.sharded_state_dict(prefix, sharded_offsets, metadata)
        by_tensor = {id(each.distributed): each for each in self.managed}
        by_tensor.update({id(each.raw): each for each in self.managed})
        tensors, _ = extract_sharded_tensors_and_factories(state)
        instance = self._instance
        self.described_parameters, self._views = {}, {}
        for described in nested_values(tensors):
            if (each := by_tensor.get(id(described.data))) is not None:
                self.described_parameters[each.raw] = described
        for key, value in list(state.items()):
            each = by_tensor.get(id(getattr(value, "data", None)))
            if each is not None:
                boxes = shard_to_boxes(
                    value, value.key, each.weight().detach(), each.start, instance
                )
                del state[key]  # an empty one would be the same for all ranks
                if boxes:
                    state[key] = dict(enumerate(boxes))
                self._views[key] = {number: box.data for number, box in enumerate(boxes)}
                for box in boxes:
                    box.data = box.data.contiguous()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Take what was loaded for `sharded_state_dict`.

        Args:
            state_dict: With the boxes' tensors in their places.
            strict: Whether what is not sharded has to be complete.
        """
        rest = {key: value for key, value in state_dict.items() if key not in self._views}
        missing, unexpected = Module.load_state_dict(self._model, rest, strict=False)
        for key, views in self._views.items():
            collect_boxes(views, state_dict.get(key, {}))
        self._views = {}
        missing = [name for name in missing if name not in self._names]
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing in the checkpoint: {missing}; unexpected: {unexpected}")
        self.module.synchronize_param_gather()

    def initialize_shards(self) -> None:
        """Draw the shards of a model whose matrices were set aside before it was wrapped."""
        initialize_shards(self.managed, self._model)

    @property
    def _model(self) -> Module:
        """The model inside of all wrappers."""
        return bare_model(self)

    @property
    def _names(self) -> set[str]:
        """Names in the bare model of what is sharded."""
        return {name for name, _ in self._model.named_parameters()}

    @property
    def _instance(self) -> int:
        """Number of the replica of the shards that this rank belongs to."""
        index = self.megatron_fsdp_dist_index
        if not index.use_hybrid_fsdp or index.hsdp_outer_dp_shard:
            return 0
        return int(index.get_outer_fsdp_group().rank())


def bare_model(chunk: Module) -> Any:
    """The model inside of Megatron's wrappers.

    Args:
        chunk: Wrapped or not.
    """
    from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
    from megatron.core.utils import unwrap_model

    inner = unwrap_model(chunk)
    return unwrap_model(inner.module) if isinstance(inner, MegatronFSDP) else inner


def keep_frozen_parameters_whole(module: Module) -> None:
    """Make buffers of the parameters without a gradient: they change outside of the optimizer.

    The expert bias is one; a shard of it could not be updated by the router.  Names stay as they
    are, in the model and in its checkpoints.

    Args:
        module: A chunk before it is wrapped; changed in place.
    """
    for owner in module.modules():
        for name, param in list(owner.named_parameters(recurse=False)):
            if not param.requires_grad:
                delattr(owner, name)
                owner.register_buffer(name, param.detach())


def shards_of(chunk: Any) -> list[ManagedParameter]:
    """The sharded parameters of a chunk; none where Megatron's DDP wraps it."""
    return list(getattr(chunk, "managed", []))
