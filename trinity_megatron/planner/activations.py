"""Bytes that a layer keeps from its forward to its backward pass, on one rank.

Layers in bf16 with fused attention, norms and activation: each linear layer keeps its input, each
norm its input, attention queries, keys, values, output and the logarithms of its sums.  Trinity's
``local`` layers keep more: see ``planner/memory.py``, which has the same sums for a whole model.
"""

from trinity_megatron.planner.context_exchange import gathered_bytes
from trinity_megatron.planner.layout import Layout
from trinity_megatron.planner.model_description import ModelDescription

_BF16, _FP32 = 2, 4


def layer_activations(model: ModelDescription, layout: Layout, layer: int) -> dict[str, float]:
    """Bytes of a layer for one micro-batch by part, by the policy of recomputation.

    Args:
        model: Sizes.
        layout: Parallel sizes, micro-batch and ``recompute``.
        layer: From 0.
    """
    tokens = layout.tokens_of_microbatch
    own = tokens / layout.tensor_model_parallel_size
    if layout.recompute == "full":
        return {"layer inputs": own * _BF16 * model.hidden_size}
    kept = full_activations(model, layout, layer)
    if layout.recompute == "selective":
        dropped = _SELECTIVE[layout.transformer_impl]
        kept = {name: size for name, size in kept.items() if name not in dropped}
    return kept


# Megatron's --recompute-modules: layernorm moe_act, or moe for the local experts, which have no
# activation of their own to recompute.
_SELECTIVE = {
    "transformer_engine": ("norm outputs", "expert activation"),
    "local": (
        "router",
        "shared experts",
        "expert inputs",
        "expert gate and up",
        "expert activation",
    ),
}


def full_activations(model: ModelDescription, layout: Layout, layer: int) -> dict[str, float]:
    """Bytes of a layer for one micro-batch by part, without recomputation."""
    is_local = layout.transformer_impl == "local"
    tokens = layout.tokens_of_microbatch
    own = tokens / layout.tensor_model_parallel_size
    hidden = model.hidden_size
    norms = 4 if model.post_norms else 2
    attention = local_attention_bytes(model) if is_local else attention_bytes(model)
    kept = {
        "norm inputs": own * _BF16 * hidden * norms,
        "norm outputs": own * _BF16 * hidden * 2,
        "attention": tokens * attention / layout.tensor_model_parallel_size,
        "keys of other ranks": gathered_bytes(model, layout, layer),
    }
    if layer < model.num_dense_layers:
        width = model.ffn_hidden_size / layout.tensor_model_parallel_size
        kept["dense MLP"] = tokens * _BF16 * 3 * width
        return kept
    shared = model.moe_shared_expert_intermediate_size / layout.tensor_model_parallel_size
    kept["shared experts"] = tokens * _BF16 * 3 * shared
    # Scores and weights in fp32, the map of tokens.
    kept["router"] = own * model.num_moe_experts * (2 * _FP32 + 2)
    rows = own * model.moe_router_topk * layout.expert_tensor_parallel_size
    width = model.moe_ffn_hidden_size / layout.expert_tensor_parallel_size
    kept["expert inputs"] = rows * _BF16 * hidden
    kept["expert gate and up"] = rows * _BF16 * 2 * width
    # Local: the activated gate, its product with up, and that with the routing weight.
    kept["expert activation"] = rows * _BF16 * width * (3 if is_local else 1)
    if model.add_bias_linear:  # outputs, for the product of bias and weight; clamped gate and up
        kept["expert biases"] = rows * (_FP32 + _BF16 * 2 * width)
    if layout.fp8_recipe:  # inputs of the experts' products are kept in one byte
        for name in ("expert inputs", "expert activation"):
            kept[name] /= 2
    return kept


def attention_bytes(model: ModelDescription) -> float:
    """Bytes of a token on all tensor-parallel ranks together, from projection to projection."""
    heads = model.num_attention_heads
    if latent := model.latent_attention:
        size = latent.qk_head_dim + latent.qk_pos_emb_head_dim
        ranks = latent.kv_lora_rank + latent.qk_pos_emb_head_dim + (latent.q_lora_rank or 0)
        return (
            _BF16 * (2 * heads * size + 2 * heads * latent.v_head_dim + 2 * ranks) + _FP32 * heads
        )
    query, keys = heads * model.kv_channels, model.num_query_groups * model.kv_channels
    kept = query + 2 * keys + query  # what attention gets, and its output
    if model.qk_layernorm:
        kept += query + keys  # before their norm
    size = _BF16 * kept + _FP32 * heads
    if model.attention_output_gate:
        # Its sigmoid in fp32, and the gated output.
        size += _BF16 * 2 * query + _FP32 * query
    return size


def local_attention_bytes(model: ModelDescription) -> float:
    """The same of Trinity's local attention.

    Kept are the projection (values are a view of it), the inputs of the norms of queries and keys,
    the rotated ones, the kernel's output, that in the order of the tokens, and that gated.
    """
    query = model.num_attention_heads * model.kv_channels
    keys = model.num_query_groups * model.kv_channels
    kept = (2 * query + 2 * keys) + (query + keys) + (query + keys) + 3 * query
    return _BF16 * kept + _FP32 * model.num_attention_heads


def logits_bytes(model: ModelDescription, layout: Layout) -> float:
    """Bytes of the logits of one micro-batch with their gradient.

    Trinity's loss writes the gradient over the logits; Megatron's keeps the probabilities in fp32
    beside them.
    """
    columns = model.vocab_size / layout.tensor_model_parallel_size
    size = _BF16 if model.is_trinity else _BF16 + _FP32
    return layout.tokens_of_microbatch * columns * size


def working_bytes(model: ModelDescription, layout: Layout) -> float:
    """Bytes that live within the backward pass of one MoE layer: gradients of rows, buffers of the
    dispatcher on both sides of the exchange."""
    own = layout.tokens_of_microbatch / layout.tensor_model_parallel_size
    rows = own * model.moe_router_topk * layout.expert_tensor_parallel_size
    width = model.moe_ffn_hidden_size / layout.expert_tensor_parallel_size
    return rows * _BF16 * (2 * model.hidden_size + 2 * width)
