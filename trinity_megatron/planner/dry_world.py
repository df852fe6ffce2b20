"""Ranks of any world, built in one process without a network and without memory.

A rank's model, gradient buffers and optimizer are those of a training, made of fake tensors: they
have shapes and types, and no data.  So what a plan says of weights, gradients and state can be held
against the objects themselves, for worlds of any size.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import UserError
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.layer_specs import get_trinity_layer_spec
from trinity_megatron.model.presets import PRESETS, trinity_preset
from trinity_megatron.optimizer.register import MuonSettings, registered_muon
from trinity_megatron.optimizer.sharded.buffer_layout import separate_muon_buffers
from trinity_megatron.planner.layout import Layout
from trinity_megatron.planner.plan import GIB, Plan
from trinity_megatron.planner.step_memory import StageMemory
from trinity_megatron.upstream.registry import replaced


@dataclass(frozen=True)
class DryRank:
    """What one rank holds, counted on its objects.

    Attributes:
        rank: In the world.
        stage: Pipeline rank.
        dense: Elements of the parameters that are no experts', expert biases included.
        experts: Elements of the experts.
        weights: Bytes of parameters and buffers.
        gradients: Bytes of the buffers of gradients.
        optimizer: Bytes of masters, momentum and moments.
    """

    rank: int
    stage: int
    dense: int
    experts: int
    weights: int
    gradients: int
    optimizer: int


def sample_ranks(layout: Layout) -> list[int]:
    """The first, a middle and the last rank of each pipeline stage."""
    size = layout.world_size // layout.pipeline_model_parallel_size
    return [
        stage * size + place
        for stage in range(layout.pipeline_model_parallel_size)
        for place in sorted({0, size // 2, size - 1})
    ]


def build_rank(plan: Plan, rank: int) -> DryRank:
    """Build one rank of a plan and count what it holds.

    Args:
        plan: Of a Trinity preset, with Megatron's DDP, in bf16.
        rank: In the world.

    Raises:
        UserError: The plan is of another kind.
    """
    check_buildable(plan)
    enter_host()
    with dry_rank(plan.layout, rank), FakeTensorMode(allow_non_fake_inputs=True):
        chunks = [_wrap(chunk, plan.layout) for chunk in _build_chunks(plan)]
        optimizer = _build_optimizer(chunks, plan.optimizer)
        return _count(chunks, optimizer, rank)


def check_buildable(plan: Plan) -> None:
    """Refuse plans that this cannot build.

    Raises:
        UserError: Says why.
    """
    if plan.model.name not in PRESETS:
        raise UserError(
            f"--verify builds Trinity's presets, and --preset {plan.model.name} is none. Remedy: "
            "drop --verify."
        )
    if plan.layout.sharding != "ddp" or plan.layout.fp8_recipe or plan.layout.moment_bytes != 4:
        raise UserError(
            "--verify builds Megatron's DDP with bf16 weights and fp32 state only. Remedy: drop "
            "--verify, or --use-megatron-fsdp, --fp8-format and --exp-avg-dtype."
        )


@contextmanager
def dry_rank(layout: Layout, rank: int) -> Iterator[None]:
    """This process as one rank of a world without a network."""
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=layout.world_size
    )
    chunks = layout.num_virtual_stages
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=layout.context_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        with replaced("torch.distributed:all_gather_object", lambda _: _gather_own_object):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()


def _gather_own_object(gathered: list[Any], own: Any, group: Any = None) -> None:
    """Every rank of a dry world has what this one has."""
    gathered[:] = [own] * len(gathered)


def _build_chunks(plan: Plan) -> list[GPTModel]:
    layout, count = plan.layout, plan.layout.num_virtual_stages
    config = trinity_preset(
        plan.model.name,
        transformer_impl="local",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        moe_grouped_gemm=True,
        sequence_parallel=layout.tensor_model_parallel_size > 1,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=count if count > 1 else None,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
    )
    stages: Sequence[int | None] = range(count) if count > 1 else (None,)
    return [_build_chunk(config, layout, stage) for stage in stages]


def _build_chunk(config: TrinityConfig, layout: Layout, vp_stage: int | None) -> GPTModel:
    return GPTModel(
        config,
        get_trinity_layer_spec(config, vp_stage=vp_stage),
        vocab_size=config.vocab_size,
        max_sequence_length=layout.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        post_process=parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        vp_stage=vp_stage,
    )


def _wrap(chunk: GPTModel, layout: Layout) -> DistributedDataParallel:
    """Megatron's DDP around a chunk, with a training's buffers."""
    separate_muon_buffers([chunk])
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=layout.grad_reduce_bytes == 4,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
    )
    return DistributedDataParallel(chunk.config, settings, chunk)


def _build_optimizer(chunks: list[DistributedDataParallel], kind: str) -> Any:
    settings = OptimizerConfig(
        optimizer=kind,
        lr=1e-3,
        bf16=True,
        use_distributed_optimizer=True,
        muon_scale_mode="shape_scaling",
        muon_tp_mode="duplicated",
    )
    with registered_muon(MuonSettings(use_gloo_process_groups=False)):
        chain = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    for part in chain.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    return chain


def _count(chunks: list[DistributedDataParallel], chain: Any, rank: int) -> DryRank:
    named = [item for chunk in chunks for item in chunk.module.named_parameters()]
    experts = sum(param.numel() for name, param in named if ".mlp.experts." in name)
    tensors = [param for _, param in named]
    tensors += [buffer for chunk in chunks for buffer in chunk.module.buffers()]
    buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    state: list[Tensor] = []
    for part in chain.chained_optimizers:
        inner = part.optimizer
        state += [param for group in inner.param_groups for param in group["params"]]
        for values in inner.state.values():
            state += [v for v in values.values() if isinstance(v, Tensor) and v.dim() > 0]
    return DryRank(
        rank=rank,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        dense=sum(param.numel() for _, param in named) - experts,
        experts=experts,
        weights=sum(tensor.nbytes for tensor in tensors),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=sum(tensor.nbytes for tensor in state),
    )


def count_model(layout: Layout, ranks: Sequence[DryRank]) -> int:
    """Elements of the whole model: what one rank of each stage has, times those with other parts.

    Tensor-parallel ranks share norms, routers and expert biases, so this wants TP 1.

    Args:
        layout: Of the world, without tensor parallelism.
        ranks: At least one of each stage; those of a stage must be alike.
    """
    assert layout.tensor_model_parallel_size == layout.expert_tensor_parallel_size == 1
    sizes = {rank.stage: (rank.dense, rank.experts) for rank in ranks}
    assert all(sizes[rank.stage] == (rank.dense, rank.experts) for rank in ranks)
    assert len(sizes) == layout.pipeline_model_parallel_size
    return sum(dense + layout.expert_model_parallel_size * own for dense, own in sizes.values())


def planned_terms(memory: StageMemory) -> dict[str, float]:
    """Of a plan, what a dry rank counts."""
    terms = memory.terms
    return {
        "weights": terms["weights"],
        "gradients": terms["gradients"],
        "optimizer": terms["optimizer state"],
    }


@dataclass(frozen=True)
class Verification:
    """Ranks that were built beside what a plan says of them.

    Attributes:
        lines: For a terminal.
        worst: Largest difference, relative to what was counted.
    """

    lines: list[str]
    worst: float


def verify_plan(plan: Plan) -> Verification:
    """Build the first, a middle and the last rank of every stage and compare.

    Raises:
        UserError: The plan cannot be built.
    """
    check_buildable(plan)
    ranks, lines, worst = [], [], 0.0
    for number in sample_ranks(plan.layout):
        rank = build_rank(plan, number)
        ranks.append(rank)
        words = []
        for name, planned in planned_terms(plan.memory[rank.stage]).items():
            counted = getattr(rank, name)
            difference = planned / counted - 1
            worst = max(worst, abs(difference))
            words.append(f"{name} {counted / GIB:.3f} GiB (plan {100 * difference:+.2f}%)")
        lines.append(
            f"  rank {number}, stage {rank.stage}: {rank.dense + rank.experts:,} parameters, "
            + ", ".join(words)
        )
    if plan.layout.tensor_model_parallel_size == 1:
        lines.append(f"  the model: {count_model(plan.layout, ranks):,} parameters")
    return Verification([f"{len(ranks)} ranks, built without memory:", *lines], worst)
