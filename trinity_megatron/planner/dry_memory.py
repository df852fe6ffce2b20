"""What a rank of a dry world holds for its part of the model: weights, gradients and state.

The wrappers and the optimizers are those of a training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host
from trinity_megatron.cpu_host.fsdp_stand_ins import fsdp_on_cpu
from trinity_megatron.optimizer.fsdp.wrapper import TrinityFSDP
from trinity_megatron.optimizer.register import MuonSettings, build_on_fsdp_or, registered_muon
from trinity_megatron.optimizer.sharded.buffer_layout import separate_muon_buffers
from trinity_megatron.planner.layout import Layout
from trinity_megatron.planner.plan import Plan
from trinity_megatron.upstream.registry import replaced

_FSDP_BUFFER = "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer"


@dataclass(frozen=True)
class HeldBytes:
    """Bytes between two steps.

    Attributes:
        weights: Of parameters and buffers.
        gradients: Of the buffers of gradients.
        optimizer: Of masters, momentum and moments.
    """

    weights: int
    gradients: int
    optimizer: int


def count_replicated(chunks: list[GPTModel], plan: Plan) -> HeldBytes:
    """Count with Megatron's DDP and distributed optimizer.

    Args:
        chunks: Bare.
        plan: Of DDP.
    """
    separate_muon_buffers(chunks)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=plan.layout.grad_reduce_bytes == 4,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
    )
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    buffers = [b for chunk in wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return HeldBytes(
        weights=sum(tensor.nbytes for chunk in chunks for tensor in _tensors(chunk)),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=_count_state(_build_optimizer(wrapped, plan.optimizer)),
    )


def count_sharded(chunks: list[GPTModel], plan: Plan) -> HeldBytes:
    """Count with Megatron-FSDP: this rank's shards, and what is not sharded.

    Args:
        chunks: Bare; one.
        plan: Of HSDP.
    """
    (chunk,) = chunks
    trained = {id(param) for param in chunk.parameters() if param.requires_grad}
    whole = sum(tensor.nbytes for tensor in _tensors(chunk) if id(tensor) not in trained)
    with _alone_and_without_data(), fsdp_on_cpu() if is_cpu_host() else nullcontext():
        wrapped = _DryFSDP(
            chunk.config,
            _sharding(plan.layout),
            chunk,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        state = _count_state(_build_optimizer([wrapped], plan.optimizer))
    groups = wrapped.param_and_grad_buffer.parameter_groups
    # The helpers hold the shards where the replicas share the state; the others are views of them.
    weights = [group.hfsdp_helper_wbuf or group.model_weight_buffer for group in groups]
    gradients = [group.hfsdp_helper_gbuf or group.main_grad_buffer for group in groups]
    return HeldBytes(
        weights=whole + sum(buffer.data.nbytes for buffer in weights),
        gradients=sum(buffer.data.nbytes for buffer in gradients),
        optimizer=state,
    )


class _DryFSDP(TrinityFSDP):
    """`TrinityFSDP` around a module without data."""

    def __init__(self, config: Any, ddp_config: Any, module: GPTModel, **kwargs: Any) -> None:
        # It is where it belongs, and torch cannot move a parameter without data.
        module.to = lambda *args: module  # type: ignore[method-assign]
        super().__init__(config, ddp_config, module, **kwargs)

    def _init_dist_index(self, pg_collection: Any) -> Any:
        with unset_fake_temporarily():  # ranks are numbers
            index = super()._init_dist_index(pg_collection)
            if index.hsdp_outer_dp_shard:
                for is_expert in (False, True):  # it keeps what it has once computed
                    index.get_logical_hybrid_fsdp_rank(is_expert)
        return index


@contextmanager
def _alone_and_without_data() -> Iterator[None]:
    """Let Megatron-FSDP wrap a model where tensors have no data and other ranks are not there."""

    def read_ranks(before: Any) -> property:
        def read(mesh: Any) -> Tensor:
            with unset_fake_temporarily():
                return before.fget(mesh)

        return property(read)

    with (
        replaced("torch.distributed.device_mesh:DeviceMesh.mesh", read_ranks),
        replaced(f"{_FSDP_BUFFER}:validate_uneven_dtensor", lambda _: lambda tensor: None),
    ):
        yield


def _sharding(layout: Layout) -> DistributedDataParallelConfig:
    """As `trinity_megatron.training.arguments.fsdp_checks` leaves a training's."""
    is_fp32 = layout.grad_reduce_bytes == 4
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=is_fp32,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy="optim_grads_params",
        outer_dp_sharding_strategy="optim" if layout.outer_shard else "no_shard",
        num_distributed_optimizer_instances=layout.num_replicas,
        megatron_fsdp_main_grads_dtype=torch.float32 if is_fp32 else None,
        bucket_size=max(40_000_000, 1_000_000 * layout.dense_ranks),  # Megatron's default
    )


def _build_optimizer(chunks: list[Any], kind: str) -> Any:
    config = OptimizerConfig(
        optimizer=kind,
        lr=1e-3,
        bf16=True,
        use_distributed_optimizer=True,
        muon_scale_mode="shape_scaling",
        muon_tp_mode="duplicated",
    )
    settings = MuonSettings(use_gloo_process_groups=False)
    build: Callable[..., Any] = build_on_fsdp_or(get_megatron_optimizer, settings)
    with registered_muon(settings):
        chain = build(config, chunks, use_gloo_process_groups=False)
    for part in chain.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    return chain


def _count_state(chain: Any) -> int:
    """Bytes of masters, momentum and moments."""
    tensors: list[Tensor] = []
    for part in chain.chained_optimizers:
        inner = part.optimizer
        tensors += [param for group in inner.param_groups for param in group["params"]]
        for values in inner.state.values():
            tensors += [v for v in values.values() if isinstance(v, Tensor) and v.dim() > 0]
    return sum(tensor.nbytes for tensor in tensors)


def _tensors(chunk: GPTModel) -> list[Tensor]:
    return [*chunk.parameters(), *chunk.buffers()]
