"""A model as the planner sees it: sizes, in Megatron's names, without importing Megatron.

The fields that a ``TrinityConfig`` has too are named as there, so that the arithmetic of shapes
takes either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.model.presets import PRESETS, get_preset
from trinity_megatron.untrusted.json_file import read_json


@dataclass(frozen=True)
class LatentAttention:
    """Ranks and head sizes of multi-head latent attention (DeepSeek-V2, section 2.1).

    Attributes:
        q_lora_rank: Rank of the queries; None where they are projected directly.
        kv_lora_rank: Rank of the compressed keys and values.
        qk_head_dim: Channels of a query or key head without position.
        qk_pos_emb_head_dim: Channels of a head with the rotary position.
        v_head_dim: Channels of a value head.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Sizes of a decoder with routed experts.

    Attributes:
        kind: ``afmoe`` (Trinity), or the ``model_type`` of a Hugging Face ``config.json``.
        num_dense_layers: Leading layers with a dense MLP.
        moe_shared_expert_intermediate_size: Width of the shared experts together; 0 for none.
        window_size: As Megatron's: (keys before a position, 0); None for full attention.
        global_attn_every_n_layers: Layer i (1-based) attends to all if i is a multiple of this.
        attention_output_gate: The queries' projection has a gate of its size beside it.
        post_norms: The outputs of attention and MLP are normalised too.
        qk_layernorm: Queries and keys are normalised.
        add_bias_linear: Linear layers, experts included, have biases.
        attention_sinks: The softmax has a learnable logit a head beside the keys.
        expert_buffer_bytes: What the router keeps for each expert besides weights: bias, its
            momentum, counter.
        latent_attention: Multi-head latent attention instead of grouped queries.
        tie_word_embeddings: Embedding and LM head are one matrix.
        training: Defaults of a run: ``seq_length``, ``global_batch_size``, ``micro_batch_size``.
        optimizer: ``muon`` or ``adam``.
    """

    name: str
    kind: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int = 0
    num_dense_layers: int = 0
    window_size: tuple[int, int] | None = None
    global_attn_every_n_layers: int = 1
    attention_output_gate: bool = False
    post_norms: bool = False
    qk_layernorm: bool = False
    add_bias_linear: bool = False
    attention_sinks: bool = False
    expert_buffer_bytes: int = 0
    latent_attention: LatentAttention | None = None
    tie_word_embeddings: bool = False
    training: Mapping[str, int] = field(default_factory=dict, hash=False)
    optimizer: str = "adam"

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def is_trinity(self) -> bool:
        """Whether our own layers train it."""
        return self.kind == "afmoe"

    def is_global_layer(self, layer_number: int) -> bool:
        """Whether the layer (1-based) attends without a window."""
        return self.window_size is None or layer_number % self.global_attn_every_n_layers == 0

    def window_of(self, layer: int) -> int | None:
        """Keys that a position of the layer (0-based) sees at most; None for all."""
        assert self.window_size is not None or self.is_global_layer(layer + 1)
        return None if self.is_global_layer(layer + 1) else self.window_size[0] + 1  # type: ignore[index]


def describe_model(name: str) -> ModelDescription:
    """The model of ``--preset``.

    Args:
        name: A preset, a ``config.json`` of Hugging Face, or a folder that has one.

    Raises:
        UserError: There is no such preset or file, or the file describes another kind of model.
    """
    if name in PRESETS:
        preset = get_preset(name)
        return _trinity(name, preset.model, preset.training)
    path = Path(name)
    for candidate in (path, path / "config.json", path / "hf" / "config.json"):
        if candidate.is_file():
            return describe_hf_config(_read(candidate), str(path))
    known = ", ".join(PRESETS)
    raise UserError(
        f"--preset {name!r} is neither a preset ({known}) nor a config.json of Hugging Face or a "
        "folder with one. Remedy: choose a preset, or name the file."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--preset {path} is not valid JSON ({error}). Remedy: mend the file."
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"--preset {path} holds no JSON object. Remedy: name a config.json.")
    return fields


def describe_hf_config(fields: Mapping[str, Any], name: str) -> ModelDescription:
    """The model that a Hugging Face ``config.json`` describes.

    Raises:
        UserError: The ``model_type`` is not one of those that are known, or a field is missing.
    """
    kind = fields.get("model_type")
    if kind not in _READERS:
        raise UserError(
            f"--preset {name}: model_type={kind!r} is not known to the planner. Remedy: one of "
            f"{', '.join(_READERS)}."
        )
    try:
        return _READERS[kind](fields, name)
    except KeyError as error:
        raise UserError(
            f"--preset {name}: {error.args[0]} is missing. Remedy: the config.json of the model."
        ) from error


def _trinity(name: str, model: Mapping[str, Any], training: Mapping[str, Any]) -> ModelDescription:
    """A preset: gate, QK-norm and post-norms are Trinity's; its router keeps fp32 bias and momentum
    and an int64 counter."""
    names = (
        "num_layers", "num_dense_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
        "num_query_groups", "kv_channels", "num_moe_experts", "moe_router_topk",
        "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "vocab_size",
    )  # fmt: skip
    return ModelDescription(
        name=name,
        kind="afmoe",
        **{field_name: model[field_name] for field_name in names},
        window_size=tuple(model["window_size"]),
        global_attn_every_n_layers=model.get("global_attn_every_n_layers", 4),
        attention_output_gate=True,
        post_norms=True,
        qk_layernorm=True,
        expert_buffer_bytes=4 + 4 + 8,
        training={
            key: training[key]
            for key in ("seq_length", "global_batch_size", "micro_batch_size")
            if key in training
        },
        optimizer="muon",
    )


def _from_afmoe(fields: Mapping[str, Any], name: str) -> ModelDescription:
    # Here, because it imports torch: the other kinds come at once.
    from trinity_megatron.model.hf_config import model_fields_from_hf

    return _trinity(name, model_fields_from_hf(fields), {})


def _attention(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all kinds of the transformers library name alike."""
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    return {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": fields.get("num_key_value_heads") or heads,
        "kv_channels": fields.get("head_dim") or hidden // heads,
        "vocab_size": fields["vocab_size"],
        "moe_router_topk": fields.get("num_experts_per_tok") or fields["experts_per_token"],
        "tie_word_embeddings": bool(fields.get("tie_word_embeddings")),
    }


def _from_qwen3_moe(fields: Mapping[str, Any], name: str) -> ModelDescription:
    if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
        raise UserError(
            f"--preset {name}: dense layers between the MoE layers (mlp_only_layers, "
            "decoder_sparse_step) are not known to the planner. Remedy: a model without."
        )
    return ModelDescription(
        name=name,
        kind="qwen3_moe",
        **_attention(fields),
        ffn_hidden_size=fields["intermediate_size"],
        num_moe_experts=fields["num_experts"],
        moe_ffn_hidden_size=fields["moe_intermediate_size"],
        qk_layernorm=True,
    )


def _from_mixtral(fields: Mapping[str, Any], name: str) -> ModelDescription:
    window = fields.get("sliding_window")
    return ModelDescription(
        name=name,
        kind="mixtral",
        **_attention(fields),
        ffn_hidden_size=fields["intermediate_size"],
        num_moe_experts=fields["num_local_experts"],
        moe_ffn_hidden_size=fields["intermediate_size"],
        window_size=(window - 1, 0) if window else None,
        global_attn_every_n_layers=fields["num_hidden_layers"] + 1,
    )


def _from_gpt_oss(fields: Mapping[str, Any], name: str) -> ModelDescription:
    return ModelDescription(
        name=name,
        kind="gpt_oss",
        **_attention(fields),
        ffn_hidden_size=fields["intermediate_size"],
        num_moe_experts=fields["num_local_experts"],
        moe_ffn_hidden_size=fields["intermediate_size"],
        window_size=(fields["sliding_window"] - 1, 0),
        global_attn_every_n_layers=2,  # layer_types: sliding, full, sliding, ...
        add_bias_linear=True,
        attention_sinks=True,
    )


def _from_deepseek_v3(fields: Mapping[str, Any], name: str) -> ModelDescription:
    width = fields["moe_intermediate_size"]
    return ModelDescription(
        name=name,
        kind="deepseek_v3",
        **_attention(fields),
        ffn_hidden_size=fields["intermediate_size"],
        num_dense_layers=fields["first_k_dense_replace"],
        num_moe_experts=fields["n_routed_experts"],
        moe_ffn_hidden_size=width,
        moe_shared_expert_intermediate_size=width * (fields.get("n_shared_experts") or 0),
        expert_buffer_bytes=4 + 4,  # Megatron's bias and counter, both fp32
        latent_attention=LatentAttention(
            fields.get("q_lora_rank"),
            fields["kv_lora_rank"],
            fields["qk_nope_head_dim"],
            fields["qk_rope_head_dim"],
            fields["v_head_dim"],
        ),
    )


_READERS: dict[str, Callable[[Mapping[str, Any], str], ModelDescription]] = {
    "afmoe": _from_afmoe,
    "qwen3_moe": _from_qwen3_moe,
    "gpt_oss": _from_gpt_oss,
    "mixtral": _from_mixtral,
    "deepseek_v3": _from_deepseek_v3,
}
