"""What every Trinity model shares, in Megatron's names, and what none of them may have.

Source: Trinity Large technical report (arXiv 2602.17004), Table 1 and section 2; transformers
``models/afmoe``.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from trinity_megatron.errors import UserError

# TransformerConfig field -> dest of Megatron's argument, where they differ.
ARGUMENT_DEST = {
    "num_moe_experts": "num_experts",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}

# Fields that say which model the weights belong to: their shapes, and how they are computed with.
SHAPE_FIELDS = (
    "num_layers",
    "num_dense_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)
MODEL_FIELDS = (
    *SHAPE_FIELDS,
    "layernorm_epsilon",
    "moe_router_topk",
    "moe_router_topk_scaling_factor",
    "window_size",
    "rotary_base",
    "global_attn_every_n_layers",
    "scale_embeddings",
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
    # Without Transformer Engine a product in fp32.  Tensor cores with fp32 output would be faster,
    # but cut off what does not fit into a sum: an error of 4e-6, computed for 3072 terms; that of
    # fp32's own operations is 5e-7.
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
}

_FIXED_FIELDS = (
    "normalization",
    "gated_linear_unit",
    "activation_func",
    "add_bias_linear",
    "qk_layernorm",
    "attention_output_gate",
    "moe_router_score_function",
)

# Paths that bypass the seams used here, or that the layers would not follow.
REFUSED_FEATURES = {
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
REFUSED_LOCAL_FEATURES = {
    "moe_apply_probs_on_input": "weighing the experts' inputs (local experts weigh their outputs)",
}
_FLAGS = {"layernorm_zero_centered_gamma": "--apply-layernorm-1p"}


def flag_of(name: str) -> str:
    """Megatron's flag of an argument or a field."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def find_other_architecture(config: TransformerConfig) -> dict[str, tuple[Any, Any]]:
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
