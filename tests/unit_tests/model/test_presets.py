"""The released models: sizes, and what a contradiction is told."""

from typing import Any

import pytest

from trinity_megatron.model.presets import PRESETS, trinity_preset


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # Totals: sums over the tensors of the hub's safetensors headers.  Active: model cards
        # and report Table 1, embeddings included, in 1e9.
        ("nano", 6_120_003_328, 1.024),
        ("mini", 26_123_974_400, 3.475),
        ("large", 398_635_286_016, 13.372),
    ],
)
def test_sizes_of_the_released_models(name: str, total: int, active: float) -> None:
    config = trinity_preset(name)
    assert config.num_parameters() == total
    # Given to three digits after the point.
    assert config.num_active_parameters() / 1e9 == pytest.approx(active, abs=5.01e-4)
    embeddings = config.num_active_parameters() - config.num_active_parameters(embeddings=False)
    assert embeddings == 2 * config.vocab_size * config.hidden_size


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="'huge' is unknown. Remedy.*") as error:
        trinity_preset("huge")
    assert all(name in str(error.value) for name in PRESETS)


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


def test_pattern_of_the_layers() -> None:
    config = trinity_preset("large", num_layers=10)
    # Source: report 2.1: three local layers with RoPE, then a global one without.
    is_global = [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert config.no_rope_freq == is_global
    assert config.window_attn_skip_freq == [1 - value for value in is_global]
    assert config.moe_layer_freq == [0] * 6 + [1] * 4


def test_memory_that_would_not_be_saved() -> None:
    given = {"recompute_granularity": "selective", "moe_grouped_gemm": True}
    with pytest.raises(ValueError, match="'moe_act'.*Remedy: "):
        trinity_preset("tiny", transformer_impl="local", recompute_modules=["moe_act"], **given)


def test_the_momentum_is_that_of_the_rule() -> None:
    # The sign rule of the report has none, also where the preset's own rule is SMEBU.
    found = {
        rule: trinity_preset("tiny", moe_router_bias_update_rule=rule).bias_momentum
        for rule in ("smebu", "sign", "linear", "none")
    }
    assert found == {"smebu": 0.5, "sign": 0.0, "linear": 0.0, "none": 0.0}
    assert trinity_preset("nano").bias_momentum == 0.0
    assert trinity_preset("large").bias_momentum == 0.5
    sign = trinity_preset("tiny", moe_router_bias_update_rule="sign", moe_router_bias_momentum=0.9)
    assert sign.bias_momentum == 0.9
