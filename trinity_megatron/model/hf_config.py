"""``TrinityConfig`` <-> the ``config.json`` of a Hugging Face checkpoint.

Source: the released ``config.json`` files; transformers ``AfmoeConfig``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import TRINITY_ARCHITECTURE
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_folder import explain_folder, refuse_quantised_config
from trinity_megatron.model.hf_numbers import MAX_THETA, check_numbers
from trinity_megatron.untrusted.json_file import read_json

CONFIG_NAME = "config.json"

# Fields that say the same on both sides.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_dense_layers": "num_dense_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "route_scale": "moe_router_topk_scaling_factor",
    "global_attn_every_n_layers": "global_attn_every_n_layers",
    "max_position_embeddings": "max_position_embeddings",
    "mup_enabled": "scale_embeddings",
}

_OTHER_SIZES = ("num_shared_experts", "sliding_window")

# Values that a file may leave out.  Source: AfmoeConfig of transformers 5.23.
_DEFAULTS: dict[str, Any] = {
    "num_dense_layers": 1,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "num_shared_experts": 2,
    "route_scale": 1.0,
    "global_attn_every_n_layers": 4,
    "sliding_window": 1024,
    "mup_enabled": False,
    "max_position_embeddings": 16384,
}

# What the Trinity layers compute; any other value would be another model.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("afmoe",),
    "hidden_act": ("silu",),
    "score_func": ("sigmoid",),
    "route_norm": (True,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "num_expert_groups": (1, None),
    "num_limited_groups": (1, None),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1.0, None),
    "num_nextn_predict_layers": (0, None),
}

# In the released files, and the same for all models.
_RELEASED = {
    "hidden_act": "silu",
    "score_func": "sigmoid",
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "use_cache": True,
    "use_grouped_mm": True,
}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        ValueError: It is missing or not JSON.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(explain_folder(folder, CONFIG_NAME))
    try:
        fields = read_json(path)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
        return fields
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). Remedy: download it again."
        ) from error


def trinity_config_from_hf(hf: Mapping[str, Any], **overrides: Any) -> TrinityConfig:
    """The model that a ``config.json`` describes.

    The rule of the expert bias is no part of the model: ``load_balance_coeff``, where given, is
    the rate of the centred sign rule (Nano, Mini); SMEBU otherwise.

    Args:
        hf: The fields of the file.
        **overrides: Any field of :class:`TrinityConfig`.

    Raises:
        ValueError: A feature that is not implemented, a missing field, or fields that contradict
            each other; names the field and its value.
    """
    return TrinityConfig(**{**TRINITY_ARCHITECTURE, **model_fields_from_hf(hf), **overrides})


def model_fields_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`TrinityConfig` beyond the shared architecture, as in a preset.

    Raises:
        ValueError: See :func:`trinity_config_from_hf`.
    """
    refuse_other_models(hf)
    given = {**_DEFAULTS, **{name: value for name, value in hf.items() if value is not None}}
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    needed = (*_SAME, *_OTHER_SIZES)
    if missing := [name for name in needed if name not in given]:
        raise UserError(
            f"{CONFIG_NAME} has no {', '.join(missing)}. Remedy: use the file of the checkpoint as "
            "it was released."
        )
    check_numbers({name: given[name] for name in needed})
    fields = {ours: given[theirs] for theirs, ours in _SAME.items()}
    if hf.get("sliding_window", 0) is None:
        raise UserError(
            f"{CONFIG_NAME}: sliding_window=None is not supported by the Trinity layers; their "
            "local layers have a window."
        )
    num_shared = given["num_shared_experts"]
    if num_shared < 1:
        raise UserError(
            f"{CONFIG_NAME}: num_shared_experts={num_shared} is not supported: Trinity's MoE "
            "layers have a shared expert."
        )
    fields.update(
        moe_shared_expert_intermediate_size=num_shared * given["moe_intermediate_size"],
        window_size=(given["sliding_window"] - 1, 0),
        rotary_base=_rope_theta(hf),
    )
    if coefficient := given.get("load_balance_coeff"):
        check_numbers({"load_balance_coeff": coefficient})
        fields.update(moe_router_bias_update_rule="sign", moe_router_bias_update_rate=coefficient)
    return fields


def refuse_other_models(hf: Mapping[str, Any]) -> None:
    """Refuse what the Trinity layers do not compute.

    Raises:
        ValueError: Names the field, its value and what is supported.
    """
    for name, values in _IMPLEMENTED.items():
        if name in hf and hf[name] not in values:
            supported = " or ".join(repr(value) for value in values if value is not None) or "null"
            raise UserError(
                f"{CONFIG_NAME}: {name}={hf[name]!r} is not supported by the Trinity layers; they "
                f"implement {name}={supported}."
            )
    if "model_type" not in hf:
        raise UserError(f"{CONFIG_NAME} has no model_type. Remedy: it must be 'afmoe'.")
    refuse_quantised_config(hf, CONFIG_NAME)
    check_numbers(hf)
    _rope_theta(hf)
    every = hf.get("global_attn_every_n_layers") or _DEFAULTS["global_attn_every_n_layers"]
    pattern = get_layer_types(hf.get("num_hidden_layers") or 0, every)
    if hf.get("layer_types") not in (None, pattern) and "num_hidden_layers" in hf:
        raise UserError(
            f"{CONFIG_NAME}: layer_types={hf['layer_types']!r} does not follow "
            f"global_attn_every_n_layers={every}, which is the only pattern that the Trinity "
            "layers implement."
        )


def get_layer_types(num_layers: int, every: int) -> list[str]:
    """The pattern of local and global layers in transformers' words."""
    return [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
        for layer in range(num_layers)
    ]


def hf_config_from_trinity(
    config: TrinityConfig, *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """``config.json`` of a model, with the fields of the released files.

    Args:
        config: The model.
        dtype: Precision in which the weights are stored.

    Raises:
        ValueError: The model has no twin in transformers; names the field.
    """
    shared, moe = config.moe_shared_expert_intermediate_size or 0, config.moe_ffn_hidden_size or 0
    if not moe or not shared or shared % moe:
        raise UserError(
            f"moe_shared_expert_intermediate_size={shared} is not a multiple of "
            f"moe_ffn_hidden_size={moe}: a Hugging Face checkpoint states it as a number of shared "
            "experts. Remedy: train with a multiple."
        )
    if config.window_size is None or config.window_size[1] != 0:
        raise UserError(f"window_size={config.window_size!r} has no twin in transformers.")
    fields: dict[str, Any] = {
        "architectures": ["AfmoeForCausalLM"],
        "model_type": "afmoe",
        "dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(config, ours) for theirs, ours in _SAME.items()},
        **_RELEASED,
        "num_shared_experts": shared // moe,
        "sliding_window": config.window_size[0] + 1,
        "rope_theta": config.rotary_base,
        "layer_types": get_layer_types(config.num_layers, config.global_attn_every_n_layers),
    }
    fields["route_scale"] = config.moe_router_topk_scaling_factor or 1.0
    if config.moe_router_bias_update_rule == "sign":
        fields["load_balance_coeff"] = config.moe_router_bias_update_rate
    return dict(sorted(fields.items()))


def compare_models(a: TrinityConfig, b: TrinityConfig) -> dict[str, tuple[Any, Any]]:
    """Fields of the model (not of its training) in which two configurations differ."""
    names = (*_SAME.values(), "moe_shared_expert_intermediate_size", "window_size", "rotary_base")
    ignored = ("vocab_size", "max_position_embeddings")  # padding; serving
    pairs = {n: (getattr(a, n), getattr(b, n)) for n in names if n not in ignored}
    return {name: pair for name, pair in pairs.items() if plain(pair[0]) != plain(pair[1])}


def plain(value: Any) -> Any:
    """A list as a tuple, so that what JSON or a parser read compares with what a config holds."""
    return tuple(value) if isinstance(value, list | tuple) else value


def plain_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` in the one form that every release of transformers reads.

    Raises:
        ValueError: See :func:`trinity_config_from_hf`.
    """
    return {"rope_type": "default", "rope_theta": _rope_theta(hf)}


def _rope_theta(hf: Mapping[str, Any]) -> float | int:
    """The base of the rotary embedding, wherever a release of transformers writes it.

    ``rope_theta``, ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5), there also once
    for each type of layer; Trinity's global layers have no RoPE.
    """
    stated: dict[str, Any] = {"rope_theta": hf.get("rope_theta")}
    for field in ("rope_scaling", "rope_parameters"):
        rope = {} if hf.get(field) is None else hf[field]
        if not isinstance(rope, dict):
            raise UserError(f"{CONFIG_NAME}: {field}={rope!r} is not an object.")
        nested = {kind: value for kind, value in rope.items() if kind in _LAYER_TYPES}
        for part in (value or {} for value in nested.values()) if nested else (rope,):
            _refuse_scaled_rope(part, field, rope)
        local = (nested.get("sliding_attention") or {}) if nested else rope
        stated[f"{field}.rope_theta"] = local.get("rope_theta")
    stated = {name: value for name, value in stated.items() if value is not None}
    for name, value in stated.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and 0 < value <= MAX_THETA):
            raise UserError(f"{CONFIG_NAME}: {name}={value!r:.40} is not a positive number.")
    if len(set(stated.values())) > 1:
        all_stated = ", ".join(f"{name}={value!r}" for name, value in stated.items())
        raise UserError(f"{CONFIG_NAME}: {all_stated} contradict each other. Remedy: state one.")
    theta = next(iter(stated.values()), 10000)
    return int(theta) if float(theta).is_integer() else float(theta)


_LAYER_TYPES = ("full_attention", "sliding_attention")


def _refuse_scaled_rope(rope: Any, field: str, whole: Mapping[str, Any]) -> None:
    if not isinstance(rope, dict):
        raise UserError(f"{CONFIG_NAME}: {field}={whole!r} is not an object of objects.")
    kind = rope.get("rope_type", rope.get("type"))
    share = rope.get("partial_rotary_factor")
    nested = any(isinstance(value, dict) for value in rope.values())
    scaled = kind is None and rope.get("factor")  # "default" does not look at it
    if nested or kind not in ("default", None) or share not in (1, None) or scaled:
        raise UserError(
            f"{CONFIG_NAME}: {field}={whole!r} is not supported by the Trinity layers; they "
            "implement rope_type='default' over the whole head."
        )
