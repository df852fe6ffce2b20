"""Muon on Megatron's distributed optimizer: state sharded evenly, matrices owned once.

Megatron's `DistributedOptimizer` does what it does for Adam: gradients are reduced to the shard of
each rank, fp32 masters and momentum exist there only, updated weights are gathered, both with
overlap where Megatron has it, in one or several optimizer instances, and checkpoints reshard.  Muon
then needs whole matrices: see `optimizer/ownership.py`.

Megatron's own `LayerWiseDistributedOptimizer` is not used: it gives whole parameters to ranks (a
stack of experts is one: 108 parts for 256 ranks in Trinity Large), pads every rank's shard to the
largest (2048 times the attention's QKV), knows no optimizer instances, and fails in fp32.
"""

import copy
import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import megatron.core.optimizer as core_optimizer
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import KEEP_VARS_HINT
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from trinity_megatron.optimizer.muon import Muon, make_stack
from trinity_megatron.optimizer.sharded.checkpoint_boxes import collect_boxes, shard_to_boxes
from trinity_megatron.optimizer.sharded.exchange import Placement
from trinity_megatron.optimizer.sharded.ownership import (
    Assignment,
    Shard,
    own_matrices,
)

ADAM_STATE_KEYS = ("exp_avg", "exp_avg_sq")


class SkippingOptimizer(ChainedOptimizer):
    """A chain that skips a step as one where the gradient is NaN or infinite.

    The gradient norm is of all ranks, so all of them skip.
    """

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        self._grad_norm = super().get_grad_norm()
        return self._grad_norm

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        if not math.isfinite(self._grad_norm):
            return False
        return bool(super().step_with_ready_grads())


class ShardedMuonOptimizer(SkippingOptimizer):
    """The chain of distributed optimizers; weights are gathered once, after all of them."""

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        for optimizer in self.chained_optimizers:
            optimizer._defer_param_sync = True
        done = super().step_with_ready_grads()
        for chunk in self.model_chunks:
            if done and not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()
        return done


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
        tensors, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        described = {tensor.data: tensor for tensor in nested_values(tensors)}
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
                elif shard.device.type == "cpu" and not _is_part_of_storage(shard):
                    # An --async-save copies parts of a storage only, and shares the others with
                    # its process, while the next steps go on.
                    shard = shard.clone()
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

    def _local_shards(self) -> Iterator[tuple[Tensor, int]]:
        """Every parameter of which this rank holds a part, and the first element of the part."""
        for buffer in self.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for param, ranges in bucket["param_map"].items():
                        yield param, ranges["param"].start

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: Any) -> None:
        # torch's AdamW has its step among the tensors; Megatron reads it from the groups instead.
        super()._set_main_param_and_optimizer_states(model_param, {"step": None, **tensors})


class ShardedOptimizer(ResumableDistributedOptimizer):
    """Megatron's distributed optimizer around `Muon` or AdamW.

    Attributes:
        is_expert: Whether its parameters are routed experts.
    """

    is_expert: bool

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if isinstance(self.optimizer, Muon) else ADAM_STATE_KEYS

    def _get_state_key_dtype(self, key: str) -> torch.dtype:
        muon = isinstance(self.optimizer, Muon)
        return self.optimizer.momentum_dtype if muon else torch.float32


def build_sharded(
    config: Any,
    model_chunks: list[Any],
    config_overrides: dict[Any, Any],
    make_muon: Callable[[list[dict[str, Any]]], Muon],
    *,
    use_gloo_process_groups: bool,
    timeout: timedelta,
) -> ShardedMuonOptimizer:
    """Build the chain: Muon on dense matrices, Muon on experts, AdamW on the rest.

    Args:
        config: ``OptimizerConfig`` with ``use_distributed_optimizer``.
        model_chunks: Wrapped in Megatron's DDP.
        config_overrides: Megatron's overrides; those of Muon among them.
        make_muon: Makes the optimizer of parameter groups.
        use_gloo_process_groups: Whether Megatron made gloo groups, for checkpoints.
        timeout: Of the group of all ranks that share the work.

    Returns:
        Megatron's optimizer.

    Raises:
        ValueError: A buffer holds parameters of both optimizers.
    """
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        None, model_chunks, use_gloo_process_groups=use_gloo_process_groups
    )
    pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    instance = 0
    if groups["dp_cp_group"].size() > groups["intra_dp_cp_group"].size():
        instance = groups["inter_dist_opt_group"].rank()
    by_kind: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for group in core_optimizer._get_param_groups(model_chunks, config, config_overrides):
        kind = group.get("optimizer", "muon"), group["is_expert_parallel"]
        by_kind.setdefault(kind, []).append(group)
    adam_config = copy.copy(config)
    adam_config.optimizer = "adam"
    makers: dict[str, Callable[[list[dict[str, Any]]], tuple[Any, Callable[..., None]]]] = {
        "muon": lambda params: (make_muon(params), lambda muon, config=None: muon.init_state()),
        "adam": lambda params: core_optimizer._get_megatron_optimizer_based_on_param_groups(
            adam_config, model_chunks, params, skip_megatron_wrapping=True
        ),
    }
    parts: list[ShardedOptimizer] = []
    for expert in (False, True):
        shared = {
            "model_chunks": model_chunks,
            "data_parallel_group": groups["intra_expt_dp_group" if expert else "intra_dp_cp_group"],
            "data_parallel_group_gloo": groups[
                "intra_expt_dp_group_gloo" if expert else "intra_dp_cp_group_gloo"
            ],
            "data_parallel_group_idx": groups[
                "expt_tp_pp_with_egtp_remat_group" if expert else "mp_group"
            ].rank(),
            "distributed_optimizer_instance_id": instance,
        }
        for name, make in makers.items():
            if not by_kind.get((name, expert)):
                continue
            optimizer, init_state = make(by_kind[name, expert])
            part = ShardedOptimizer(
                optimizer,
                config,
                None,
                init_state,
                per_model_buffers=_buffers(model_chunks, name, expert),
                **shared,
            )
            part.is_expert = expert
            part.grad_stats_parallel_group = groups["intra_dist_opt_group"]
            part.tp_group = pg_collection.tp
            part.expert_tp_group = pg_collection.expt_tp
            parts.append(part)
    muons = [part for part in parts if isinstance(part.optimizer, Muon)]
    place_matrices(muons, pg_collection, timeout)
    if muons:
        muons[0].optimizer.step_together([part.optimizer for part in muons[1:]])
    return ShardedMuonOptimizer(parts)


def _buffers(model_chunks: list[Any], optimizer: str, expert: bool) -> dict[int, list[Any]]:
    """Buffers of one optimizer, by model chunk."""
    found: dict[int, list[Any]] = {}
    for number, chunk in enumerate(model_chunks):
        for buffer in chunk.expert_parallel_buffers if expert else chunk.buffers:
            owners = {
                "muon" if getattr(p, "is_managed_by_layer_wise_optimizer", False) else "adam"
                for p in buffer.params
            }
            if len(owners) > 1:
                raise ValueError(
                    "Muon and AdamW would share a gradient buffer; add separate_muon_buffers() to "
                    "the pre_wrap_hooks of the model"
                )
            if owners == {optimizer}:
                found.setdefault(number, []).append(buffer)
    return found


def place_matrices(
    optimizers: list[ShardedOptimizer], groups: ProcessGroupCollection, timeout: timedelta
) -> None:
    """Tell every Muon how its matrices lie on the ranks and who owns which.

    All ranks of an optimizer instance share the work, those of other pipeline stages too: stages
    differ in what they hold, and all of them step at the same time.  Every rank of the world has
    the same optimizers, be they empty.

    Args:
        optimizers: Of dense parameters and of experts; either may be missing.
        groups: Megatron's groups.
        timeout: Of a group that has to be made.
    """
    scenes = {part.is_expert: _Scene(part, groups, timeout) for part in optimizers}
    dense, experts = scenes.get(False), scenes.get(True)
    if dense and experts:
        members = [dense.ranks.index(rank) for rank in experts.ranks]
        places = _gather(experts.rank, dense.group)
        owned = own_matrices(dense.stacks, experts.stacks, places, members)
    elif dense or experts:
        places = members = list(range(len((dense or experts).ranks)))  # type: ignore[union-attr]
        owned = own_matrices(
            dense.stacks if dense else [], experts.stacks if experts else [], places, members
        )
    for scene, assignment in zip((dense, experts), owned if scenes else (), strict=False):
        if scene:
            scene.place(assignment)
    if scenes and torch.distributed.get_rank() == 0:
        loads = owned[1 if experts else 0].loads
        print(
            f"> Muon: {sum(len(found.matrices) for found in owned)} matrices owned by "
            f"{len(loads)} ranks, the busiest with {loads.max() / loads.mean():.3f} times the mean "
            f"work; masters and momentum of this rank: "
            f"{sum(scene.state_bytes for scene in scenes.values()) / 2**20:,.1f} MiB",
            flush=True,
        )


class _Scene:
    """Parameters of one distributed optimizer on all ranks that can share its work."""

    def __init__(
        self, part: ShardedOptimizer, groups: ProcessGroupCollection, timeout: timedelta
    ) -> None:
        self.muon = part.optimizer
        self.device = torch.device(torch.cuda.current_device())
        own = torch.distributed.get_process_group_ranks(part.data_parallel_group)
        tables = _gather(own, groups.expt_tp if part.is_expert else groups.tp)
        shards = {id(model): shard for model, shard in _model_and_shard(part)}
        stacks, tensors = [], []
        for buffer in part.buffers:
            for param, (start, _, bucket) in buffer.param_index_map.items():
                holders = shard_bounds(start, param.numel(), buffer.bucket_indices[bucket], tables)
                stacks.append(make_stack(param, param.shape, holders))
                tensors.append(shards.get(id(param)))
        stages = _gather((tables, stacks), groups.pp)
        ranks = sorted({rank for tables, _ in stages for table in tables for rank in table})
        self.ranks = ranks
        self.rank = ranks.index(torch.distributed.get_rank())
        self.group = _group_of(ranks, part.data_parallel_group, timeout)
        places = {rank: place for place, rank in enumerate(ranks)}
        self.stacks = [stack.renumbered(places) for _, found in stages for stack in found]
        self.tensors: list[Tensor | None] = [None] * len(self.stacks)
        first = sum(len(found) for _, found in stages[: groups.pp.rank()])
        self.tensors[first : first + len(tensors)] = tensors
        itemsize = 4 + self.muon.momentum_dtype.itemsize
        self.state_bytes = sum(t.numel() * itemsize for t in tensors if t is not None)

    def place(self, assignment: Assignment) -> None:
        """Hand the owners to the optimizer."""
        placement = Placement(
            self.stacks, self.tensors, assignment, self.device, self.group, self.rank
        )
        self.muon.place([placement])


def shard_bounds(
    start: int, numel: int, bucket: tuple[int, int], tables: list[list[int]]
) -> list[tuple[Shard, ...]]:
    """Who holds which elements of a parameter.

    Args:
        start: First element of the parameter in the buffer.
        numel: Its elements.
        bucket: First and last element of its bucket.
        tables: For each tensor-parallel rank, the ranks of its data-parallel shards.

    Returns:
        For each tensor-parallel rank, its shards, in order.
    """
    ranks = len(tables[0])
    size = (bucket[1] - bucket[0]) // ranks
    offset = start - bucket[0]
    numbers = range(offset // size, -(-(offset + numel) // size))
    return [
        tuple(
            Shard(table[n], max(n * size - offset, 0), min((n + 1) * size - offset, numel))
            for n in numbers
        )
        for table in tables
    ]


def _is_part_of_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def _model_and_shard(part: ShardedOptimizer) -> list[tuple[Tensor, Tensor]]:
    pairs = [
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        (part.model_fp32_groups, part.shard_fp32_groups),
    ]
    return [
        found
        for models, shards in pairs
        for model_group, shard_group in zip(models, shards, strict=True)
        for found in zip(model_group, shard_group, strict=True)
    ]


def _gather(value: Any, group: ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def _group_of(ranks: list[int], data_parallel: ProcessGroup, timeout: timedelta) -> ProcessGroup:
    """The group of these ranks; every rank of the world calls it, with its own ranks."""
    world = torch.distributed.group.WORLD
    assert world is not None
    wanted = _gather(ranks, world)
    own = torch.distributed.get_process_group_ranks(data_parallel)
    if all(len(some) == len(own) for some in wanted):
        return data_parallel  # neither tensor nor pipeline parallelism: Megatron has the group
    found = None
    for some in sorted({tuple(some) for some in wanted}):
        group = torch.distributed.new_group(list(some), timeout=timeout)
        if list(some) == ranks:
            found = group
    assert found is not None
    return found
