"""Shapes of the parameters of a pipeline stage, in the order of the model, without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A parameter.

    Attributes:
        name: As Megatron names it.
        shape: On one rank.
        is_expert: It is one of the routed experts', replicated over their data-parallel group.
    """

    name: str
    shape: tuple[int, ...]
    is_expert: bool = False

    @cached_property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def is_vector_or_vocabulary(self) -> bool:
        """Whether AdamW updates it in a run with Muon: norms, biases, embedding and LM head."""
        return len(self.shape) < 2 or self.name.startswith(("embedding.", "output_layer."))


def stage_shapes(
    model: Any,
    vocab_size: int,
    layers: Sequence[int],
    is_first: bool,
    is_last: bool,
    expert_parallel: int,
    *,
    tensor_parallel: int = 1,
    expert_tensor_parallel: int = 1,
) -> Iterator[Shape]:
    """Yield the parameters that one rank of a pipeline stage holds.

    Args:
        model: A ``ModelDescription`` or ``TrinityConfig``.
        vocab_size: Rows of the embedding.
        layers: Layers (from 0) of the stage.
        is_first: It has the embedding.
        is_last: It has the final norm and the LM head.
        expert_parallel: Expert-parallel size.
        tensor_parallel: Tensor-parallel size of all but the experts.
        expert_tensor_parallel: Tensor-parallel size of the experts.
    """
    hidden, tp = model.hidden_size, tensor_parallel
    if is_first:
        yield Shape("embedding.word_embeddings.weight", (vocab_size // tp, hidden))
    for layer in layers:
        prefix = f"decoder.layers.{layer}."
        yield from _attention_shapes(model, prefix, tp)
        if layer < model.num_layers - model.num_moe_layers:
            yield from _mlp_shapes(model, f"{prefix}mlp.", model.ffn_hidden_size // tp)
            continue
        yield from _moe_shapes(model, f"{prefix}mlp.", expert_parallel, expert_tensor_parallel, tp)
    if is_last:
        yield Shape("decoder.final_layernorm.weight", (hidden,))
        if not (is_first and getattr(model, "tie_word_embeddings", False)):
            yield Shape("output_layer.weight", (vocab_size // tp, hidden))


def _attention_shapes(model: Any, prefix: str, tp: int) -> Iterator[Shape]:
    hidden, head = model.hidden_size, model.kv_channels
    post_norms = getattr(model, "post_norms", True)
    yield Shape(f"{prefix}input_layernorm.weight", (hidden,))
    if post_norms:
        yield Shape(f"{prefix}post_self_attn_layernorm.weight", (hidden,))
    attention = f"{prefix}self_attention."
    if latent := getattr(model, "latent_attention", None):
        yield from _latent_shapes(model, latent, attention, tp)
    else:
        query = model.num_attention_heads * head // tp
        keys = (model.num_query_groups or model.num_attention_heads) * head // tp
        gates = 2 if model.attention_output_gate else 1
        yield Shape(f"{attention}linear_proj.weight", (hidden, query))
        yield Shape(f"{attention}linear_qkv.weight", (gates * query + 2 * keys, hidden))
        if model.add_bias_linear:
            yield Shape(f"{attention}linear_proj.bias", (hidden,))
            yield Shape(f"{attention}linear_qkv.bias", (gates * query + 2 * keys,))
        if model.qk_layernorm:
            for norm in ("q_layernorm", "k_layernorm"):
                yield Shape(f"{attention}{norm}.weight", (head,))
    yield Shape(f"{prefix}pre_mlp_layernorm.weight", (hidden,))
    if post_norms:
        yield Shape(f"{prefix}post_mlp_layernorm.weight", (hidden,))


def _latent_shapes(model: Any, latent: Any, prefix: str, tp: int) -> Iterator[Shape]:
    hidden, heads = model.hidden_size, model.num_attention_heads // tp
    query = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    yield Shape(f"{prefix}linear_proj.weight", (hidden, heads * latent.v_head_dim))
    if latent.q_lora_rank is None:
        yield Shape(f"{prefix}linear_q_proj.weight", (query, hidden))
    else:
        yield Shape(f"{prefix}linear_q_down_proj.weight", (latent.q_lora_rank, hidden))
        yield Shape(f"{prefix}linear_q_up_proj.weight", (query, latent.q_lora_rank))
        yield Shape(f"{prefix}q_layernorm.weight", (latent.q_lora_rank,))
    rank = latent.kv_lora_rank
    yield Shape(f"{prefix}linear_kv_down_proj.weight", (rank + latent.qk_pos_emb_head_dim, hidden))
    keys_and_values = heads * (latent.qk_head_dim + latent.v_head_dim)
    yield Shape(f"{prefix}linear_kv_up_proj.weight", (keys_and_values, rank))
    yield Shape(f"{prefix}kv_layernorm.weight", (rank,))


def _mlp_shapes(model: Any, prefix: str, width: int) -> Iterator[Shape]:
    yield Shape(f"{prefix}linear_fc1.weight", (2 * width, model.hidden_size))
    yield Shape(f"{prefix}linear_fc2.weight", (model.hidden_size, width))


def _moe_shapes(model: Any, prefix: str, ep: int, etp: int, tp: int) -> Iterator[Shape]:
    hidden, count = model.hidden_size, model.num_moe_experts // ep
    width = model.moe_ffn_hidden_size // etp
    yield Shape(f"{prefix}router.weight", (model.num_moe_experts, hidden))
    experts = f"{prefix}experts."
    yield Shape(f"{experts}linear_fc1.weight", (count, 2 * width, hidden), is_expert=True)
    yield Shape(f"{experts}linear_fc2.weight", (count, hidden, width), is_expert=True)
    if model.add_bias_linear:
        yield Shape(f"{prefix}router.bias", (model.num_moe_experts,))
        yield Shape(f"{experts}linear_fc1.bias", (count * 2 * width,), is_expert=True)
        yield Shape(f"{experts}linear_fc2.bias", (count * hidden,), is_expert=True)
    if shared := model.moe_shared_expert_intermediate_size:
        yield from _mlp_shapes(model, f"{prefix}shared_experts.", shared // tp)
