"""This process as one rank of any world, without a network, and the rank's part of the model.

Made of fake tensors: they have shapes and types, and no data.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.layer_specs import get_trinity_layer_spec
from trinity_megatron.model.presets import trinity_preset
from trinity_megatron.planner.layout import Layout
from trinity_megatron.planner.plan import Plan
from trinity_megatron.upstream.registry import replaced


@contextmanager
def dry_rank(layout: Layout, rank: int) -> Iterator[None]:
    """Be one rank of a world in the block; what is made there has no data.

    Args:
        layout: Of the world.
        rank: In the world.
    """
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
            num_distributed_optimizer_instances=layout.num_replicas,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        with (
            replaced("torch.distributed:all_gather_object", lambda _: _gather_own_object),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()


def _gather_own_object(gathered: list[Any], own: Any, group: Any = None) -> None:
    """Every rank of a dry world has what this one has."""
    gathered[:] = [own] * len(gathered)


def build_chunks(plan: Plan) -> list[GPTModel]:
    """The chunks of the model that this rank holds, bare.

    Args:
        plan: Of a Trinity preset.
    """
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
