"""transformers' ``AfmoeForCausalLM`` with the weights of one of our (unsharded) models."""

import torch
from transformers import AfmoeConfig, AfmoeForCausalLM

from trinity_megatron.model.config import TrinityConfig


def hf_config(config: TrinityConfig, **overrides: object) -> AfmoeConfig:
    """The same architecture in transformers' field names."""
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_dense_layers": config.num_dense_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "rms_norm_eps": config.layernorm_epsilon,
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "num_shared_experts": config.moe_shared_expert_intermediate_size
        // config.moe_ffn_hidden_size,
        "route_scale": config.moe_router_topk_scaling_factor,
        "global_attn_every_n_layers": config.global_attn_every_n_layers,
        "sliding_window": config.window_size[0] + 1,
        "mup_enabled": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 8192,
        **overrides,
    }
    return AfmoeConfig(**values)


def split_qkv_gate(weight: torch.Tensor, config: TrinityConfig) -> dict[str, torch.Tensor]:
    """Take Megatron's rows per query group [q.. | gate.. | k | v] apart by a slow loop."""
    head, groups = config.kv_channels, config.num_query_groups
    per_group = config.num_attention_heads // groups
    parts: dict[str, list[torch.Tensor]] = {"q": [], "gate": [], "k": [], "v": []}
    rows = iter(weight.split(head, dim=0))
    for _ in range(groups):
        for name, count in (("q", per_group), ("gate", per_group), ("k", 1), ("v", 1)):
            parts[name] += [next(rows) for _ in range(count)]
    return {name: torch.cat(heads) for name, heads in parts.items()}


def hf_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Our unsharded model's tensors under transformers' in-memory names."""
    config: TrinityConfig = model.config
    ours = {**dict(model.named_parameters())}
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for layer in range(config.num_layers):
        a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for norm in ("input", "post_attention", "pre_mlp", "post_mlp"):
            theirs[f"{b}{norm}_layernorm.weight"] = ours[f"{a}{norm}_layernorm.weight"]
        for name, part in split_qkv_gate(
            ours[f"{a}self_attention.linear_qkv.weight"], config
        ).items():
            theirs[f"{b}self_attn.{name}_proj.weight"] = part
        theirs[f"{b}self_attn.o_proj.weight"] = ours[f"{a}self_attention.linear_proj.weight"]
        for head in "qk":
            name = f"self_attention.{head}_layernorm.weight"
            theirs[f"{b}self_attn.{head}_norm.weight"] = ours[a + name]
        mlps = {"mlp": "mlp"} if layer < config.num_dense_layers else {}
        if not mlps:
            mlps = {"mlp.shared_experts": "mlp.shared_experts"}
            theirs[f"{b}mlp.router.gate.weight"] = ours[f"{a}mlp.router.weight"]
            theirs[f"{b}mlp.expert_bias"] = ours[f"{a}mlp.router.expert_bias"]
            theirs[f"{b}mlp.experts.gate_up_proj"] = ours[f"{a}mlp.experts.linear_fc1.weight"]
            theirs[f"{b}mlp.experts.down_proj"] = ours[f"{a}mlp.experts.linear_fc2.weight"]
        for mine, their in mlps.items():
            gate, up = ours[f"{a}{mine}.linear_fc1.weight"].chunk(2)
            theirs[f"{b}{their}.gate_proj.weight"] = gate
            theirs[f"{b}{their}.up_proj.weight"] = up
            theirs[f"{b}{their}.down_proj.weight"] = ours[f"{a}{mine}.linear_fc2.weight"]
    return {name: tensor.detach() for name, tensor in theirs.items()}


def hf_model(model: torch.nn.Module, **overrides: object) -> AfmoeForCausalLM:
    """A transformers model that holds copies of our weights."""
    twin = AfmoeForCausalLM(hf_config(model.config, **overrides))
    twin.load_state_dict(hf_state_dict(model), strict=True)
    return twin
