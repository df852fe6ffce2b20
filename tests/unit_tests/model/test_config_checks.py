"""What a ``TrinityConfig`` refuses: the field, its value and the remedy."""

from typing import Any

import pytest

from trinity_megatron.model.presets import trinity_preset


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ({"num_dense_layers": 5}, "num_dense_layers", "5"),
        ({"num_moe_experts": None}, "num_moe_experts", "None"),
        ({"num_moe_experts": 30, "expert_model_parallel_size": 4}, "num_moe_experts", "30"),
        ({"moe_router_topk": 64}, "moe_router_topk", "64"),
        ({"tensor_model_parallel_size": 3}, "tensor_model_parallel_size", "3"),
        ({"tensor_model_parallel_size": 4}, "tensor_model_parallel_size", "4"),
        ({"num_query_groups": 3}, "num_query_groups", "3"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers", "0"),
        ({"moe_router_bias_update_rule": "adam"}, "moe_router_bias_update_rule", "'adam'"),
        ({"moe_expert_capacity_factor": 1.5}, "moe_expert_capacity_factor", "1.5"),
        ({"mtp_num_layers": 1}, "mtp_num_layers", "1"),
        ({"init_method_std": 0.01}, "init_method_std", "0.01"),
        ({"embedding_init_method_std": 0.5}, "embedding_init_method_std", "0.5"),
        ({"normalization": "LayerNorm"}, "normalization", "'LayerNorm'"),
        ({"moe_router_score_function": "softmax"}, "moe_router_score_function", "'softmax'"),
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            "moe_router_load_balancing_type",
            "'sinkhorn'",
        ),
        (
            {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 1e-3},
            "moe_aux_loss_coeff",
            "0.001",
        ),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma", "True"),
        (
            {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "transformer_impl": "local"},
            "moe_apply_probs_on_input",
            "True",
        ),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value", "7.0"),
    ],
)
def test_contradictions(overrides: dict[str, Any], field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}.*Remedy: "):
        trinity_preset("tiny", **overrides)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("moe_router_bias_momentum", 1.0, "below 1"),
        ("moe_router_bias_clamp_scale", 0.0, "positive"),
        ("moe_router_bias_update_rate", -1e-3, "not negative"),
        ("moe_router_bias_warmup_steps", -1, "not negative"),
        ("moe_router_bias_freeze_step", -1, "not negative"),
        ("lm_head_z_loss_coeff", -1e-4, "not negative"),
        ("moe_router_bias_update_rule", "tanh", "unknown"),
    ],
)
def test_balance_options_are_checked(field: str, value: object, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}.*{wanted}.*Remedy: "):
        trinity_preset("tiny", **{field: value})


def test_memory_that_would_not_be_saved() -> None:
    given = {"recompute_granularity": "selective", "moe_grouped_gemm": True}
    with pytest.raises(ValueError, match="'moe_act'.*Remedy: "):
        trinity_preset("tiny", transformer_impl="local", recompute_modules=["moe_act"], **given)
