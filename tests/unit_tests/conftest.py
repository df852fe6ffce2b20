"""Megatron's parallel state for one rank, and small models on it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.unit_tests.parallel_state import one_rank_world

SMALL: dict[str, Any] = {
    "transformer_impl": "local",
    "num_layers": 4,
    "num_dense_layers": 1,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_load_balancing_type": "none",
    "window_size": (7, 0),
    "vocab_size": 96,
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo world of one.  Taken down after the module: other tests fork ranks of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with one_rank_world(tmp_path_factory.mktemp("store") / "store"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def fp32_in_mkl() -> Iterator[None]:
    """torch's own choice on every CPU: the rows of experts are not filled up for oneDNN."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def build(one_rank: None) -> Callable[..., Any]:
    """Build an initialised model of ``SMALL`` with other fields."""
    from megatron.core.models.gpt import GPTModel

    from trinity_megatron.model.architecture import TRINITY_ARCHITECTURE
    from trinity_megatron.model.config import TrinityConfig
    from trinity_megatron.model.initialization import initialize_parameters
    from trinity_megatron.model.layer_specs import get_trinity_layer_spec

    def make(**overrides: Any) -> Any:
        config = TrinityConfig(**{**TRINITY_ARCHITECTURE, **SMALL, **overrides})
        model = GPTModel(
            config,
            get_trinity_layer_spec(config),
            vocab_size=config.vocab_size,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        (model,) = initialize_parameters([model])
        return model

    return make
