"""``TrinityConfig``: Megatron's ``TransformerConfig`` plus only what Megatron lacks.

Source: Trinity Large technical report (arXiv 2602.17004), Table 1 and section 2; transformers
``models/afmoe``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from trinity_megatron.errors import UserError
from trinity_megatron.model.moe.expert_bias import BIAS_RULES, DEFAULT_MOMENTUM

BiasUpdateRule = Literal["smebu", "sign", "linear", "none"]

# TransformerConfig field -> dest of Megatron's argument, where they differ.
ARGUMENT_DEST = {"num_moe_experts": "num_experts"}

# Fields that say which model the weights belong to: their shapes, and how they are computed with.
SHAPE_FIELDS = (
    "num_layers num_dense_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
    "kv_channels num_moe_experts moe_ffn_hidden_size moe_shared_expert_intermediate_size"
).split()
MODEL_FIELDS = (
    *SHAPE_FIELDS,
    *(
        "layernorm_epsilon moe_router_topk moe_router_topk_scaling_factor window_size rotary_base "
        "global_attn_every_n_layers scale_embeddings"
    ).split(),
)

# What every member of the family shares, in Megatron's own field names.
TRINITY_ARCHITECTURE: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    "qk_layernorm": True,
    "attention_output_gate": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
}


@dataclass
class TrinityConfig(TransformerConfig):
    """Configuration of a Trinity (AFMoE) model.

    ``num_dense_layers`` and ``global_attn_every_n_layers`` are the only places where the layer
    pattern is stated: ``moe_layer_freq``, ``no_rope_freq`` and ``window_attn_skip_freq`` follow.

    Raises:
        UserError: A field contradicts another one or the architecture; the message names the
            field, its value and the remedy.
    """

    vocab_size: int = 200192
    """Rows of the embedding and of the LM head, padding included."""

    tokenizer_vocab_size: int | None = None
    """Rows that a token can have: ids below it.  The others are Megatron's padding; None where it
    is not known."""

    num_dense_layers: int = 0
    """Leading layers with a dense MLP; the others are MoE layers."""

    global_attn_every_n_layers: int = 4
    """Layer i (1-based) is global (no window, no RoPE) if i is a multiple of this, else local."""

    rotary_base: int = 10000
    """Base of the rotary embedding of the local layers (theta)."""

    max_position_embeddings: int = 131072
    """Longest context that the model is meant for; nothing is allocated by it."""

    scale_embeddings: bool = True
    """Multiply the embedding by sqrt(d) (report eq 39; ``mup_enabled`` in transformers)."""

    moe_router_bias_update_rule: BiasUpdateRule = "smebu"
    """Rule of the expert bias: ``smebu`` (report eq 23-28), ``sign`` (centred sign, 19-22),
    ``linear`` (SMEBU without tanh) or ``none`` (the bias stays)."""

    moe_router_bias_update_rate: float = 5e-4
    """SMEBU's lambda, or the rate of another rule (report section 2.2; Megatron's is 1e-3)."""

    moe_router_bias_momentum: float | None = None
    """Beta, the momentum of the bias update (report eq 27); None for the rule's own: 0.5 for
    ``smebu``, 0 for the others."""

    moe_router_bias_clamp_scale: float = 2.0
    """SMEBU's kappa, the scale inside the tanh (report eq 24)."""

    moe_router_bias_warmup_steps: int = 0
    """Steps over which the update rate of the bias rises linearly from zero."""

    moe_router_bias_freeze_step: int | None = None
    """Last step that moves the bias; None to move it to the end."""

    lm_head_z_loss_coeff: float = 0.0
    """Coefficient of the mean squared logsumexp of the LM head's logits (report section 3.3)."""

    init_seed: int = 1234
    """Seed of the parameter initialisation, which does not depend on the parallel layout."""

    finalize_model_grads_func: Callable | None = None

    def __post_init__(self) -> None:
        """Check the fields, derive the layer pattern and run Megatron's own checks."""
        self._check()
        self.moe_layer_freq = [
            int(layer >= self.num_dense_layers) for layer in range(self.num_layers)
        ]
        pattern = [self.is_global_layer(layer + 1) for layer in range(self.num_layers)]
        self.no_rope_freq = [int(is_global) for is_global in pattern]
        self.window_attn_skip_freq = [int(not is_global) for is_global in pattern]
        # Every matrix is drawn by initialization.initialize_parameters after the build, so that
        # the values do not depend on the layout; the builders' own draws would be thrown away.
        self.perform_initialization = False
        self.init_method_std = self.initializer_std
        super().__post_init__()

    @classmethod
    def from_transformer_config(cls, config: TransformerConfig) -> TrinityConfig:
        """Turn a plain Megatron config (an unmodified ``pretrain_gpt.py``) into a Trinity one.

        Args:
            config: Finished Megatron config; returned as it is if it is a ``TrinityConfig``.

        Raises:
            UserError: The config contradicts the architecture, e.g. a softmax router.
        """
        if isinstance(config, cls):
            return config
        values = {f.name: getattr(config, f.name) for f in fields(TransformerConfig)}
        if wrong := _find_other_architecture(config):
            raise UserError(
                "The Trinity layer spec was asked for with a config of another architecture: "
                + ", ".join(f"{k}={v!r} (Trinity: {ours!r})" for k, (v, ours) in wrong.items())
                + ". Set the matching Megatron flags, or use examples/pretrain_trinity.py --preset."
            )
        values["num_dense_layers"] = count_dense_layers(
            values["moe_layer_freq"], num_layers=config.num_layers
        )
        # Derived by __post_init__ once more; their finished values would be refused as input.
        for name in ("init_method", "output_layer_init_method", "embedding_init_method"):
            values[name] = None
        return cls(**values)

    @property
    def initializer_std(self) -> float:
        """Sigma of the truncated normal of every matrix: 0.5/sqrt(d).  Source: report eq 37-38."""
        return 0.5 / math.sqrt(self.hidden_size)

    @property
    def post_norm_gain(self) -> float:
        """Initial gain of the two post-norms: 1/sqrt(L).  Source: report eq 34-35."""
        return self.num_layers**-0.5

    @property
    def embedding_multiplier(self) -> float:
        """Factor on the embedding: sqrt(d), or 1 without ``scale_embeddings``.

        Source: report eq 39.
        """
        return math.sqrt(self.hidden_size) if self.scale_embeddings else 1.0

    @property
    def bias_momentum(self) -> float:
        """Beta of the bias update: the one that is set, or the rule's own."""
        if self.moe_router_bias_momentum is not None:
            return self.moe_router_bias_momentum
        return DEFAULT_MOMENTUM[self.moe_router_bias_update_rule]

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return self.num_layers - self.num_dense_layers

    def is_global_layer(self, layer_number: int) -> bool:
        """Whether the layer (1-based) attends without window and without RoPE."""
        return layer_number % self.global_attn_every_n_layers == 0

    def num_parameters(self) -> int:
        """Number of parameters of the whole model, by arithmetic (nothing is built).

        The expert bias is counted, as in the released checkpoints.
        """
        return self._count(self.num_moe_experts or 0)

    def num_active_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters that one token uses.

        Args:
            embeddings: Count the embedding and the LM head (the convention of the model cards).
        """
        active = self._count(self.moe_router_topk)
        return active if embeddings else active - 2 * self.vocab_size * self.hidden_size

    def _count(self, num_experts: int) -> int:
        d, head_dim = self.hidden_size, self.kv_channels
        assert head_dim is not None and self.num_query_groups is not None
        query = self.num_attention_heads * head_dim * d  # the same for q, gate and o
        attention = 3 * query + 2 * self.num_query_groups * head_dim * d + 2 * head_dim
        norms = 4 * d
        dense = 3 * d * (self.ffn_hidden_size or 0)
        moe = 0
        if self.num_moe_layers:
            shared = 3 * d * (self.moe_shared_expert_intermediate_size or 0)
            routed = num_experts * 3 * d * (self.moe_ffn_hidden_size or 0)
            total = self.num_moe_experts or 0
            moe = total * d + total + shared + routed  # router, expert bias, experts
        layers = self.num_layers * (attention + norms)
        layers += self.num_dense_layers * dense + self.num_moe_layers * moe
        return 2 * self.vocab_size * d + d + layers

    def _check_initialization(self) -> None:
        given = {
            "init_method_std": self.init_method_std,
            "embedding_init_method_std": self.embedding_init_method_std,
        }
        for name, value in given.items():
            if value not in (None, _MEGATRON_STD, self.initializer_std):
                raise UserError(
                    f"{name}={value} would be overwritten: every matrix is drawn with 0.5/sqrt("
                    f"hidden_size) = {self.initializer_std:.6g}. Remedy: drop the flag "
                    f"{flag_of(name)}."
                )

    def _check_architecture(self) -> None:
        for name, (value, expected) in _find_other_architecture(self).items():
            raise UserError(
                f"{name}={value!r} is another architecture. Remedy: {expected!r}, as Trinity has "
                "it."
            )
        kinds = self.moe_router_load_balancing_type
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            if kind not in _BALANCE_LOSSES:
                raise UserError(
                    f"moe_router_load_balancing_type={kinds!r} is not followed by Trinity's "
                    f"router. Remedy: one of {', '.join(_BALANCE_LOSSES)}."
                )
        if kinds == "none" and self.moe_aux_loss_coeff:
            raise UserError(
                f"moe_aux_loss_coeff={self.moe_aux_loss_coeff!r} with "
                "moe_router_load_balancing_type='none': there would be no such loss. Remedy: "
                "--moe-router-load-balancing-type seq_aux_loss."
            )

    def _check_pipeline(self) -> None:
        stages = self.pipeline_model_parallel_size
        is_uneven = (
            self.pipeline_model_parallel_layout
            or self.num_layers_in_first_pipeline_stage
            or self.num_layers_in_last_pipeline_stage
            or self.account_for_embedding_in_pipeline_split
            or self.account_for_loss_in_pipeline_split
        )
        if self.num_layers % stages and not is_uneven:
            raise UserError(
                f"num_layers={self.num_layers} is not divisible by pipeline_model_parallel_size="
                f"{stages}. Remedy: choose --pipeline-model-parallel-size among the divisors of "
                f"{self.num_layers}, or cut the layers with --pipeline-model-parallel-layout."
            )

    def _check_balance(self) -> None:
        if self.moe_router_bias_update_rule not in BIAS_RULES:
            raise UserError(
                f"moe_router_bias_update_rule={self.moe_router_bias_update_rule!r} is unknown. "
                f"Remedy: --moe-router-bias-update-rule {', '.join(BIAS_RULES)}."
            )
        for name, is_good, wanted in (
            ("moe_router_bias_momentum", 0 <= self.bias_momentum < 1, "at least 0 and below 1"),
            ("moe_router_bias_clamp_scale", self.moe_router_bias_clamp_scale > 0, "positive"),
            ("moe_router_bias_update_rate", self.moe_router_bias_update_rate >= 0, "not negative"),
            (
                "moe_router_bias_warmup_steps",
                self.moe_router_bias_warmup_steps >= 0,
                "not negative",
            ),
            (
                "moe_router_bias_freeze_step",
                (self.moe_router_bias_freeze_step or 0) >= 0,
                "not negative",
            ),
            ("lm_head_z_loss_coeff", self.lm_head_z_loss_coeff >= 0, "not negative"),
        ):
            if not is_good:
                raise UserError(
                    f"{name}={getattr(self, name)!r} must be {wanted}. "
                    f"Remedy: set {flag_of(name)} so."
                )

    def _check(self) -> None:
        experts, ep = self.num_moe_experts, self.expert_model_parallel_size
        tp, heads, groups = (
            self.tensor_model_parallel_size,
            self.num_attention_heads,
            self.num_query_groups,
        )
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise UserError(
                f"num_dense_layers={self.num_dense_layers} is not within 0..num_layers="
                f"{self.num_layers}. Remedy: set --num-dense-layers accordingly."
            )
        if self.num_moe_layers and not experts:
            raise UserError(
                f"num_moe_experts={experts!r}, but {self.num_moe_layers} layers are MoE layers. "
                "Remedy: set --num-experts, or --num-dense-layers to the number of layers."
            )
        if experts and experts % ep:
            raise UserError(
                f"num_moe_experts={experts} is not divisible by expert_model_parallel_size={ep}. "
                f"Remedy: choose --expert-model-parallel-size among the divisors of {experts}."
            )
        if experts and not 1 <= self.moe_router_topk <= experts:
            raise UserError(
                f"moe_router_topk={self.moe_router_topk} is not within 1..num_moe_experts="
                f"{experts}. Remedy: lower --moe-router-topk or raise --num-experts."
            )
        self._check_pipeline()
        if heads % tp:
            raise UserError(
                f"tensor_model_parallel_size={tp} does not divide num_attention_heads={heads}. "
                f"Remedy: choose --tensor-model-parallel-size among the divisors of {heads}."
            )
        if groups and heads % groups:
            raise UserError(
                f"num_query_groups={groups} does not divide num_attention_heads={heads}. "
                f"Remedy: choose --num-query-groups among the divisors of {heads}."
            )
        if groups and tp > groups:
            raise UserError(
                f"tensor_model_parallel_size={tp} is larger than num_query_groups={groups}: a key "
                f"head would be split. Remedy: --tensor-model-parallel-size at most {groups}."
            )
        if self.global_attn_every_n_layers < 1:
            raise UserError(
                f"global_attn_every_n_layers={self.global_attn_every_n_layers} must be positive. "
                "Remedy: 4 is the released pattern."
            )
        self._check_balance()
        if self.fp8 and self.transformer_impl == "local":
            raise UserError(
                f"fp8={self.fp8!r} with transformer_impl='local': the local layers would go on in "
                "bf16 without a word. Remedy: --transformer-impl transformer_engine, or drop "
                "--fp8-format."
            )
        if self.transformer_impl == "local" and "moe_act" in (self.recompute_modules or ()):
            raise UserError(
                "recompute_modules has 'moe_act', which the local experts do not look at: no "
                "memory would be saved. Remedy: --recompute-modules moe, or --transformer-impl "
                "transformer_engine."
            )
        self._check_architecture()
        self._check_initialization()
        refused = dict(_REFUSED_FEATURES)
        if self.transformer_impl == "local":
            refused.update(_REFUSED_LOCAL_FEATURES)
        for name, what in refused.items():
            value = getattr(self, name)
            if value:
                raise UserError(
                    f"{name}={value!r}: {what} is not supported by the Trinity layers. "
                    f"Remedy: drop the flag {flag_of(name)}."
                )


def flag_of(name: str) -> str:
    """Megatron's flag of an argument or a field."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _find_other_architecture(config: TransformerConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that no Trinity model may change: what they are, and what they should be."""
    pairs = {name: (getattr(config, name), TRINITY_ARCHITECTURE[name]) for name in _FIXED_FIELDS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def count_dense_layers(moe_layer_freq: int | list[int], *, num_layers: int) -> int:
    """Number of leading dense layers in Megatron's pattern.

    Args:
        moe_layer_freq: 1 for each MoE layer and 0 for each dense one, or every how many layers.
        num_layers: Layers of the model.

    Raises:
        UserError: A dense layer follows an MoE layer.
    """
    pattern = moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(layer % pattern == 0) for layer in range(num_layers)]
    num_dense_layers = list(pattern).index(1) if 1 in pattern else num_layers
    if 0 in pattern[num_dense_layers:]:
        raise UserError(
            f"moe_layer_freq={pattern!r}: Trinity has its dense layers first. Remedy: "
            "--moe-layer-freq '([0]*D+[1]*M)'."
        )
    return num_dense_layers


_FIXED_FIELDS = (
    "normalization gated_linear_unit activation_func add_bias_linear qk_layernorm "
    "attention_output_gate moe_router_score_function"
).split()

_MEGATRON_STD = 0.02  # its default
_BALANCE_LOSSES = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")

# Paths that bypass the seams used here, or that the layers would not follow.
_REFUSED_FEATURES = {
    "overlap_moe_expert_parallel_comm": "overlapping the expert all-to-all with computation",
    "moe_expert_capacity_factor": "dropping tokens (Trinity is dropless)",
    "moe_router_num_groups": "group-limited routing",
    "moe_latent_size": "a latent MoE",
    "mtp_num_layers": "multi-token prediction",
    "use_mup": "muP's set of scalings (Trinity scales the embedding only)",
    "fp4": "FP4",
    "fp8_param": "weights kept in FP8 (Muon and the stacked experts update bf16 and fp32 ones)",
    "fp8_output_proj": "an LM head in FP8",
    "fp8_dot_product_attention": "the products inside attention in FP8",
    "fp8_multi_head_attention": "the products inside attention in FP8",
    "moe_router_padding_for_quantization": "routing that is padded (the experts pad their rows)",
    "moe_single_grouped_weight": "Transformer Engine's grouped parameter (experts are stacked)",
    "use_transformer_engine_op_fuser": "Transformer Engine's operation fuser",
    "init_model_with_meta_device": "building the model on the meta device",
    "delay_wgrad_compute": "delaying the weight gradients",
    "overlap_dispatch_backward_with_experts_wgrad": "delaying the weight gradients of the experts",
    "layernorm_zero_centered_gamma": "a norm's gain around 1 (its initial gains would be wrong)",
    "qk_l2_norm": "an L2 norm of queries and keys (they have an RMSNorm)",
    "activation_func_clamp_value": "clamping inside the activation",
    "glu_linear_offset": "an offset inside the activation",
    "moe_router_quantile_balancing_ema": "balancing by quantiles",
    "moe_enable_routing_replay": "replaying a recorded routing",
    "use_grouped_gemm_for_shared_expert": "a grouped product in the shared expert",
    "use_grouped_gemm_for_dense_mlp": "a grouped product in the dense MLP",
    "fused_residual_rmsnorm": "fusing the residual with the norm (post-norms lie between them)",
    "experimental_attention_variant": "another attention",
}
_REFUSED_LOCAL_FEATURES = {
    "moe_apply_probs_on_input": "weighing the experts' inputs (local experts weigh their outputs)",
}
_FLAGS = {"layernorm_zero_centered_gamma": "--apply-layernorm-1p"}
