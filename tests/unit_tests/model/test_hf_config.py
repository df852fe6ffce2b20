"""``config.json``: the released values, transformers' reading of them, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AfmoeConfig

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import (
    compare_models,
    hf_config_from_trinity,
    plain_rope,
    read_hf_config,
    trinity_config_from_hf,
)
from trinity_megatron.model.presets import trinity_preset

# design/trinity.md 1.1: Table 1 of the report and the released config.json files.
RELEASED: dict[str, tuple[Any, Any, Any]] = {
    "num_hidden_layers": (56, 32, 60),
    "num_dense_layers": (2, 2, 6),
    "hidden_size": (1024, 2048, 3072),
    "intermediate_size": (3072, 6144, 12288),
    "num_attention_heads": (8, 32, 48),
    "num_key_value_heads": (2, 4, 8),
    "head_dim": (128, 128, 128),
    "num_experts": (128, 128, 256),
    "num_experts_per_tok": (8, 8, 4),
    "num_shared_experts": (1, 1, 1),
    "moe_intermediate_size": (256, 1024, 3072),
    "route_scale": (2.826, 2.826, 2.448),
    "sliding_window": (2048, 2048, 4096),
    "max_position_embeddings": (131072, 131072, 524288),
}
SHARED: dict[str, Any] = {
    "architectures": ["AfmoeForCausalLM"],
    "model_type": "afmoe",
    "dtype": "bfloat16",
    "vocab_size": 200192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "rope_scaling": None,
    "score_func": "sigmoid",
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "mup_enabled": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "global_attn_every_n_layers": 4,
    "initializer_range": 0.02,
    "use_grouped_mm": True,
    "attention_dropout": 0.0,
}
MODELS = ("nano", "mini", "large")
each_model = pytest.mark.parametrize("name", MODELS)


def released(name: str) -> dict[str, Any]:
    """The fields of a released file."""
    own = {field: values[MODELS.index(name)] for field, values in RELEASED.items()}
    types = ["sliding_attention"] * own["num_hidden_layers"]
    types[3::4] = ["full_attention"] * len(types[3::4])
    fields = {**SHARED, **own, "layer_types": types}
    return {**fields, "load_balance_coeff": 0.001} if name == "nano" else fields


@each_model
def test_released_values(name: str) -> None:
    ours = hf_config_from_trinity(trinity_preset(name))
    expected = released(name)
    assert {field: ours.get(field, "absent") for field in expected} == expected
    assert json.loads(json.dumps(ours)) == ours


@each_model
def test_transformers_reads_the_same_model(name: str) -> None:
    theirs = AfmoeConfig(**hf_config_from_trinity(trinity_preset(name)))
    expected = released(name)
    known = {field.name for field in dataclasses.fields(AfmoeConfig)} & set(expected)
    # Only what transformers has renamed, or does not know, may be left out here.
    assert {*RELEASED, "layer_types", "mup_enabled", "rms_norm_eps", "vocab_size"} <= known
    expected["dtype"] = torch.bfloat16
    assert {field: getattr(theirs, field) for field in known} == {f: expected[f] for f in known}
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 10000}


def fields_of(config: TrinityConfig) -> dict[str, Any]:
    """What a file also states, but compare_models() leaves out."""
    names = "vocab_size max_position_embeddings moe_router_bias_update_rule".split()
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_there_and_back(name: str) -> None:
    config = trinity_preset(name)
    back = trinity_config_from_hf(hf_config_from_trinity(config))
    assert compare_models(config, back) == {}
    assert fields_of(back) == fields_of(config)
    if config.moe_router_bias_update_rule == "sign":
        assert back.moe_router_bias_update_rate == config.moe_router_bias_update_rate
    assert back.num_parameters() == config.num_parameters()


@each_model
def test_released_file_is_the_preset(name: str) -> None:
    assert compare_models(trinity_config_from_hf(released(name)), trinity_preset(name)) == {}


@pytest.mark.parametrize(
    "other",
    [
        {"num_layers": 6},
        {"num_dense_layers": 2},
        {"hidden_size": 128},
        {"ffn_hidden_size": 512},
        {"num_attention_heads": 4},
        {"num_query_groups": 4},
        {"kv_channels": 16},
        {"num_moe_experts": 16},
        {"moe_router_topk": 2},
        {"moe_ffn_hidden_size": 32},
        {"moe_shared_expert_intermediate_size": 128},
        {"moe_router_topk_scaling_factor": 1.5},
        {"window_size": (63, 0)},
        {"layernorm_epsilon": 1e-6},
        {"rotary_base": 50000},
        {"global_attn_every_n_layers": 2},
        {"scale_embeddings": False},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_model_is_told_apart(other: dict[str, Any]) -> None:
    config, changed = trinity_preset("tiny"), trinity_preset("tiny", **other)
    (field, value), *_ = other.items()
    assert compare_models(config, changed) == {field: (getattr(config, field), value)}
    # So it survives a conversion, too.
    assert compare_models(changed, trinity_config_from_hf(hf_config_from_trinity(changed))) == {}


THEIRS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 9,
    "num_dense_layers": 2,
    "num_attention_heads": 6,
    "head_dim": 12,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "num_shared_experts": 3,
    "route_scale": 1.25,
    "global_attn_every_n_layers": 3,
    "sliding_window": 33,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 777,
    "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
}


def check_same(config: TrinityConfig, theirs: AfmoeConfig) -> None:
    """Compare field by field."""
    pairs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_dense_layers": config.num_dense_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "route_scale": config.moe_router_topk_scaling_factor,
        "rms_norm_eps": config.layernorm_epsilon,
        "max_position_embeddings": config.max_position_embeddings,
        "mup_enabled": config.scale_embeddings,
    }
    assert {name: getattr(theirs, name) for name in pairs} == pairs
    width = theirs.num_shared_experts * theirs.moe_intermediate_size
    assert config.moe_shared_expert_intermediate_size == width
    # They count the token itself.
    assert config.window_size == (theirs.sliding_window - 1, 0)
    assert config.rotary_base == theirs.rope_parameters["rope_theta"]
    is_global = [kind == "full_attention" for kind in theirs.layer_types]
    layers = range(1, config.num_layers + 1)
    assert [config.is_global_layer(layer) for layer in layers] == is_global


@pytest.mark.parametrize("fields", [THEIRS, {}], ids=["all fields", "defaults"])
@pytest.mark.parametrize("mup", [True, False])
def test_reads_what_transformers_writes(fields: dict[str, Any], mup: bool, tmp_path: Path) -> None:
    theirs = AfmoeConfig(**fields, mup_enabled=mup)
    check_same(trinity_config_from_hf(theirs.to_dict()), theirs)
    theirs.save_pretrained(tmp_path)
    check_same(trinity_config_from_hf(read_hf_config(tmp_path)), theirs)


def test_both_spellings_of_the_rotary_base() -> None:
    fields = released("nano")
    fields["rope_theta"] = 500000.0
    assert trinity_config_from_hf(fields).rotary_base == 500000
    del fields["rope_theta"]
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 70000.0}
    assert trinity_config_from_hf(fields).rotary_base == 70000


DEFAULT = {"rope_type": "default", "rope_theta": 70000.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": DEFAULT},
        {"rope_scaling": {"type": "default", "rope_theta": 70000}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 70000.0},
        {"rope_scaling": {}, "rope_theta": 70000.0},
        {"rope_scaling": None, "rope_parameters": DEFAULT},
        {"rope_scaling": DEFAULT, "rope_parameters": DEFAULT, "rope_theta": 70000},
        {"rope_parameters": {"rope_theta": 70000.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"sliding_attention": DEFAULT, "full_attention": DEFAULT}},
        {"rope_parameters": {"sliding_attention": DEFAULT, "full_attention": None}},
    ],
)
def test_default_rope_in_every_spelling(rope: dict[str, Any]) -> None:
    fields = {name: value for name, value in released("nano").items() if "rope" not in name}
    assert trinity_config_from_hf({**fields, **rope}).rotary_base == 70000
    theirs = AfmoeConfig(rope_parameters=plain_rope(rope))
    assert theirs.rope_parameters["rope_theta"] == 70000


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "value",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "longrope", "short_factor": [1.0]},
        {"factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"sliding_attention": {"rope_type": "yarn", "factor": 4.0}},
        {"full_attention": {"rope_type": "linear", "factor": 4.0}},
        "default",
    ],
)
def test_scaled_rope_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        trinity_config_from_hf({**released("nano"), field: value})
    assert f"{field}={value!r}" in str(error.value) and "\n" not in str(error.value)


def test_two_rotary_bases_contradict_each_other() -> None:
    fields = {**released("nano"), "rope_theta": 10000.0, "rope_parameters": DEFAULT}
    with pytest.raises(ValueError, match=r"rope_theta=10000.0, rope_parameters.rope_theta=70000"):
        trinity_config_from_hf(fields)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("score_func", "softmax"),
        ("route_norm", False),
        ("n_group", 8),
        ("topk_group", 4),
        ("num_expert_groups", 2),
        ("num_limited_groups", 2),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("rope_scaling", YARN),
        ("rope_parameters", YARN),
        ("layer_types", ["full_attention"] * 56),
        ("num_shared_experts", 0),
    ],
)
def test_other_features_are_refused(field: str, value: Any) -> None:
    fields = released("nano")
    trinity_config_from_hf(fields)  # so it is this field
    fields[field] = value
    with pytest.raises(ValueError) as error:
        trinity_config_from_hf(fields)
    assert f"{field}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
    ],
)
def test_missing_fields_are_named(field: str) -> None:
    fields = released("nano")
    del fields[field]
    with pytest.raises(ValueError, match=rf"has no {field}\b"):
        trinity_config_from_hf(fields)


def test_missing_or_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json. Remedy"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(released("nano"))[:-5])
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"moe_shared_expert_intermediate_size": 96}, "moe_shared_expert_intermediate_size=96"),
        ({"window_size": None}, "window_size=None"),
        ({"window_size": (127, 5)}, r"window_size=\(127, 5\)"),
    ],
)
def test_models_without_a_twin(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        hf_config_from_trinity(trinity_preset("tiny", **overrides))
