"""Rules between sizes, as they are told for the fields of a config and for the flags of a run."""

from typing import Any

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.model.size_rules import check_sizes

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "num_dense_layers": 1,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "num_moe_experts": 32,
    "moe_router_topk": 4,
    "global_attn_every_n_layers": 4,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
}


def check(**overrides: Any) -> None:
    """Check sizes that are written ``name=value``."""
    sizes = {**SIZES, **overrides}
    check_sizes(sizes.get, lambda name: f"{name}={sizes[name]!r}")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"num_dense_layers": 5}, ("num_dense_layers", "num_layers")),
        ({"num_dense_layers": -1}, ("num_dense_layers", "num_layers")),
        ({"num_moe_experts": None}, ("num_moe_experts",)),
        (
            {"num_moe_experts": 30, "expert_model_parallel_size": 4},
            ("num_moe_experts", "expert_model_parallel_size"),
        ),
        ({"moe_router_topk": 64}, ("moe_router_topk", "num_moe_experts")),
        ({"moe_router_topk": 0}, ("moe_router_topk", "num_moe_experts")),
        ({"pipeline_model_parallel_size": 3}, ("num_layers", "pipeline_model_parallel_size")),
        (
            {"tensor_model_parallel_size": 3},
            ("tensor_model_parallel_size", "num_attention_heads"),
        ),
        ({"num_query_groups": 3}, ("num_query_groups", "num_attention_heads")),
        ({"tensor_model_parallel_size": 4}, ("tensor_model_parallel_size", "num_query_groups")),
        ({"global_attn_every_n_layers": 0}, ("global_attn_every_n_layers",)),
    ],
)
def test_a_contradiction_names_values_and_remedy(
    overrides: dict[str, Any], names: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match="Remedy: ") as error:
        check(**overrides)
    for name in names:
        assert f"{name}={ {**SIZES, **overrides}[name]!r}" in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_dense_layers": 4, "num_moe_experts": None},
        {"num_dense_layers": 0},
        {"expert_model_parallel_size": 32},
        {"moe_router_topk": 32},
        {"tensor_model_parallel_size": 2},
        {"num_query_groups": None, "tensor_model_parallel_size": 8},
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "Et*2|t|tL"},
        {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 1},
        {"pipeline_model_parallel_size": 3, "account_for_loss_in_pipeline_split": True},
    ],
)
def test_sizes_that_fit_are_accepted(overrides: dict[str, Any]) -> None:
    check(**overrides)
