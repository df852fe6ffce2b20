"""Megatron's distributed optimizer around Muon or AdamW: what a rank holds, saves and loads.

Megatron's `DistributedOptimizer` does what it does for Adam: gradients are reduced to the shard of
each rank, fp32 masters and momentum exist there only, updated weights are gathered, both with
overlap where Megatron has it, in one or several optimizer instances, and checkpoints reshard.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import KEEP_VARS_HINT
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from trinity_megatron.optimizer.muon import Muon
from trinity_megatron.optimizer.sharded.checkpoint_boxes import collect_boxes, shard_to_boxes

ADAM_STATE_KEYS = ("exp_avg", "exp_avg_sq")


class ResumableDistributedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer, which saves and loads torch's AdamW too.

    Megatron's own knows the AdamW of Transformer Engine and of apex only.
    """

    def state_dict(self) -> dict[str, Any]:
        """The groups, with Adam's step; before the first step too, where Megatron's asserts."""
        inner = self.optimizer.state_dict()
        steps = [state["step"] for state in inner["state"].values() if "step" in state]
        # FusedAdam counts in the groups, and not in those that are empty on this rank.
        steps += [group["step"] for group in inner["param_groups"] if "step" in group]
        step = max((int(step) for step in steps), default=0)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in inner["param_groups"]]
        for group in groups:
            group["step"] = step
        state: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; Megatron gives all of AdamW's states one tensor for the step, counted by each."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
        """This rank's shards as boxes of the parameters; Megatron's would gather all of them.

        Args:
            model_sharded_state_dict: Of the model, with parameters as data.
            is_loading: Whether the boxes are to be filled.
            metadata: Megatron's; nothing of it changes the boxes.

        Returns:
            By number of the parameter, name of the state and number of the box.

        Raises:
            ValueError: A parameter is not in the model's state.
        """
        described = self.described_parameters(model_sharded_state_dict)
        found: dict[int, dict[str, dict[int, ShardedTensor]]] = {}
        self._loading: dict[int, dict[str, tuple[Tensor, dict[int, Tensor]]]] = {}
        for number, (param, start) in enumerate(self._local_shards()):
            if param not in described:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is not in the sharded state dict "
                    f"of the model. {KEEP_VARS_HINT}"
                )
            found[number], self._loading[number] = {}, {}
            states = self._get_main_param_and_optimizer_states(param)
            for name in ("param", *self.optimizer_state_keys):
                # AdamW makes its state in its first step; until then it is zero.
                shard = states[name] if name in states else torch.zeros_like(states["param"])
                if is_loading:
                    shard = torch.empty_like(shard, device="cpu")
                boxes = shard_to_boxes(
                    described[param],
                    f"optimizer.state.{name}.{described[param].key}",
                    shard.detach().view(-1),
                    start,
                    self.distributed_optimizer_instance_id,
                )
                found[number][name] = dict(enumerate(boxes))
                if is_loading:
                    views = {index: box.data for index, box in enumerate(boxes)}
                    self._loading[number][name] = shard, views
                    for box in boxes:  # which --ckpt-fully-parallel-load sends on as they lie
                        box.data = box.data.contiguous()
        return found

    def sharded_param_state_dp_reshardable(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[Any, Any]:
        """Megatron's default format: its buffers as they lie, and zeros where they have gaps.

        Megatron fills the gaps with memory that nobody has written.

        Args:
            model_sharded_state_dict: Of the model.
            is_loading: Whether the tensors are to be filled.
            metadata: Megatron's.
        """
        state = super().sharded_param_state_dp_reshardable(
            model_sharded_state_dict, is_loading, metadata
        )
        if is_loading:
            return state
        for number in range(len(self.gbuf_ranges)):
            for part in (p for buckets in state[number].values() for b in buckets for p in b):
                for tensor in part.values():
                    if isinstance(tensor, ShardedTensor) and part["padding"].obj:
                        tensor.data = tensor.data.detach().zero_()
        return state

    @torch.no_grad()
    def load_parameter_state_from_fully_reshardable(
        self, state_dict: dict[int, dict[str, dict[int, Tensor]]]
    ) -> None:
        """Take what was loaded into the boxes.

        Args:
            state_dict: Tensors, ordered as the boxes were.
        """
        for number, (param, _) in enumerate(self._local_shards()):
            shards = self._loading.pop(number)
            for name, (_, views) in shards.items():
                collect_boxes(views, state_dict[number][name])
            whole = {name: shard for name, (shard, _) in shards.items()}
            self._set_main_param_and_optimizer_states(param, whole)
        if isinstance(self.optimizer, HybridDeviceOptimizer):
            self.optimizer._sync_hdo_state_to_sub_optimizers()

    def described_parameters(self, model_state: dict[str, Any]) -> dict[Tensor, Any]:
        """How each parameter is saved, by the parameter.

        Args:
            model_state: Sharded state dict of the model, with parameters as data.
        """
        tensors, _ = extract_sharded_tensors_and_factories(model_state)
        return {tensor.data: tensor for tensor in nested_values(tensors)}

    def _local_shards(self) -> Iterator[tuple[Tensor, int]]:
        """Every parameter of which this rank holds a part, and the first element of the part."""
        for buffer in self.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for param, ranges in bucket["param_map"].items():
                        yield param, ranges["param"].start

    @torch.no_grad()  # a master of fp32 weights is a view of the weight, which Megatron writes into
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: Any) -> None:
        # torch's AdamW has its step among the tensors.  It was loaded with the groups; in its
        # dp_reshardable format Megatron passes the step of before the load on.
        super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": None})


class BufferEntry(NamedTuple):
    """A parameter in a buffer that is cut into equal shards.

    Attributes:
        param: The parameter of the model.
        start: Its first element in the buffer.
        bucket: First and last element of its bucket.
        shard: This rank's fp32 part of it, flat; None where it has none.
    """

    param: Tensor
    start: int
    bucket: tuple[int, int]
    shard: Tensor | None


class ShardedOptimizer(ResumableDistributedOptimizer):
    """Megatron's distributed optimizer around `Muon` or AdamW.

    Attributes:
        is_expert: Whether its parameters are routed experts.
        has_replicas: Whether `shard_ranks` are those of replicas.
    """

    is_expert: bool
    has_replicas = False

    def shard_ranks(self, groups: ProcessGroupCollection) -> list[list[int]]:
        """For each tensor-parallel rank, or each replica, the ranks of its shards, in order.

        Args:
            groups: Megatron's groups.
        """
        own_ranks = torch.distributed.get_process_group_ranks(self.data_parallel_group)
        return gather_objects(own_ranks, groups.expt_tp if self.is_expert else groups.tp)

    def entries(self) -> Iterator[BufferEntry]:
        """All parameters of its buffers, the same on all ranks that share them."""
        shards = self._shards_by_parameter()
        for buffer in self.buffers:
            for param, (start, _, bucket) in buffer.param_index_map.items():
                yield BufferEntry(param, start, buffer.bucket_indices[bucket], shards.get(param))

    def _shards_by_parameter(self) -> dict[Tensor, Tensor]:
        """This rank's fp32 shard of every model parameter of which it holds a part."""
        shards: dict[Tensor, Tensor] = {}
        for model_groups, shard_groups in (
            (self.model_float16_groups, self.shard_fp32_from_float16_groups),
            (self.model_fp32_groups, self.shard_fp32_groups),
        ):
            for models, masters in zip(model_groups, shard_groups, strict=True):
                shards.update(zip(models, masters, strict=True))
        return shards

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if isinstance(self.optimizer, Muon) else ADAM_STATE_KEYS

    def _get_state_key_dtype(self, key: str) -> torch.dtype:
        muon = isinstance(self.optimizer, Muon)
        return self.optimizer.momentum_dtype if muon else torch.float32


def gather_objects(value: Any, group: ProcessGroup) -> list[Any]:
    """Return the value of every rank of the group."""
    values: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values
