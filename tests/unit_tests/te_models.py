"""Models of both implementations, described for comparison, with a GPU or without."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.unit_tests.conftest import SMALL

ATTRIBUTES = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "sequence_parallel",
    "allreduce",
)
ABSENT = {"partition_stride": 1, "partition_dim": -1, "allreduce": True}  # else False


def allow_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Transformer Engine's modules be built on a machine without a GPU, or skip the test."""
    pytest.importorskip("transformer_engine.pytorch")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def build_model(implementation: str, **fields: Any) -> Any:
    """A model of ``SMALL`` on this rank, with weights that are not initialised."""
    from megatron.core.models.gpt import GPTModel

    from trinity_megatron.model.architecture import TRINITY_ARCHITECTURE
    from trinity_megatron.model.config import TrinityConfig
    from trinity_megatron.model.layer_specs import get_trinity_layer_spec

    values = {**TRINITY_ARCHITECTURE, **SMALL, "use_cpu_initialization": True}
    config = TrinityConfig(**{**values, "transformer_impl": implementation, **fields})
    return GPTModel(
        config,
        get_trinity_layer_spec(config),
        vocab_size=config.vocab_size,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def describe_parameters(model: torch.nn.Module) -> dict[str, tuple]:
    """Shape, dtype and what Megatron and Muon read off a parameter."""
    return {
        name: (
            tuple(parameter.shape),
            parameter.dtype,
            *(getattr(parameter, a, ABSENT.get(a, False)) for a in ATTRIBUTES),
        )
        for name, parameter in model.named_parameters()
    }


def metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def describe_shards(model: Any) -> dict[str, set[tuple]]:
    """Key -> what this rank has of it: whole shape, offset, replica."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories

    state = model.sharded_state_dict(metadata=metadata())
    apply_factories(state)
    shards: dict[str, set[tuple]] = {}
    for shard in nested_values(state):
        if isinstance(shard, ShardedObject):
            place: tuple = (tuple(shard.global_shape), tuple(shard.global_offset))
        else:
            place = (
                tuple(shard.global_shape),
                tuple(shard.global_offset),
                tuple(shard.local_shape),
            )
        shards.setdefault(shard.key, set()).add((*place, tuple(shard.replica_id)))
    return shards


@contextmanager
def fake_world(rank: int, size: int, **parallel: int) -> Iterator[None]:
    """This process as one rank of a world without a network."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **parallel)
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
