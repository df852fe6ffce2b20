"""Floating-point operations of a token, for any described model."""

from trinity_megatron.planner.layer_time import attention_pairs
from trinity_megatron.planner.model_description import ModelDescription
from trinity_megatron.planner.shapes import stage_shapes


def flops_per_token(model: ModelDescription, seq_length: int) -> float:
    """FLOPs of one token's forward and backward pass (a multiply-add is 2, backward twice forward).

    Counted as Megatron counts: every matrix that a token meets, LM head included, and the two
    attention products with windows and causality.
    """
    matrices = 0.0
    layers = range(model.num_layers)
    for shape in stage_shapes(model, model.vocab_size, layers, True, True, 1):
        if shape.name.startswith("embedding.") or len(shape.shape) < 2:
            continue
        share = model.moe_router_topk / model.num_moe_experts if shape.is_expert else 1.0
        matrices += share * shape.numel
    if model.tie_word_embeddings:
        matrices += model.vocab_size * model.hidden_size
    pairs = sum(attention_pairs(seq_length, model.window_of(layer)) for layer in layers)
    channels = 2.0 * model.kv_channels
    if latent := model.latent_attention:
        channels = latent.qk_head_dim + latent.qk_pos_emb_head_dim + latent.v_head_dim
    attention = model.num_attention_heads * channels * pairs / seq_length
    return 6.0 * (matrices + attention)
