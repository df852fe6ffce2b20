"""Trinity's forward pass in float64, written down from the report; slow and plain.

Weights have transformers' names, as ``tests.reference.hf_afmoe.hf_state_dict`` returns them.
"""

import math

import torch
import torch.nn.functional as F

from tests.reference.attention import attention
from trinity_megatron.model.config import TrinityConfig

Weights = dict[str, torch.Tensor]


def logits(
    weights: Weights, config: TrinityConfig, tokens: torch.Tensor, selected: list[torch.Tensor]
) -> torch.Tensor:
    """Logits ``[b, s, vocab]``.

    Args:
        weights: float64.
        config: The model's.
        tokens: ``[b, s]``.
        selected: For each MoE layer, which experts each token goes to, bool ``[s * b, E]``.  Given,
            because a score that another precision rounds differently selects another expert.
    """
    x = weights["model.embed_tokens.weight"][tokens] * math.sqrt(config.hidden_size)
    choices = iter(selected)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        is_global = config.is_global_layer(layer + 1)
        a = _attention(own, config, _norm(x, own["input_layernorm.weight"]), is_global)
        x = x + _norm(a, own["post_attention_layernorm.weight"])
        u = _norm(x, own["pre_mlp_layernorm.weight"])
        m = _swiglu(own, "mlp.", u) if layer < config.num_dense_layers else None
        m = moe(own, config, u, next(choices)) if m is None else m
        x = x + _norm(m, own["post_mlp_layernorm.weight"])
    return F.linear(_norm(x, weights["model.norm.weight"]), weights["lm_head.weight"])


def _norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain


def _attention(
    own: Weights, config: TrinityConfig, x: torch.Tensor, is_global: bool
) -> torch.Tensor:
    parts = {n: F.linear(x, own[f"self_attn.{n}_proj.weight"]) for n in ("q", "k", "v", "gate")}
    heads = {n: p.unflatten(-1, (-1, config.kv_channels)).transpose(0, 1) for n, p in parts.items()}
    q = _norm(heads["q"], own["self_attn.q_norm.weight"])
    k = _norm(heads["k"], own["self_attn.k_norm.weight"])
    window = None
    if not is_global:
        q, k, window = _rotate(q, config), _rotate(k, config), config.window_size[0] + 1
    mixed = attention(q, k, heads["v"], window=window).transpose(0, 1)
    return F.linear(mixed * torch.sigmoid(parts["gate"]), own["self_attn.o_proj.weight"])


def _rotate(x: torch.Tensor, config: TrinityConfig) -> torch.Tensor:
    """Rotary embedding of ``[s, b, heads, d]``; channel i belongs to channel i + d / 2."""
    length, half = x.shape[0], x.shape[-1] // 2
    frequency = config.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (torch.arange(length, dtype=torch.float64)[:, None] * frequency)[:, None, None]
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _swiglu(own: Weights, prefix: str, x: torch.Tensor) -> torch.Tensor:
    gate, up = (F.linear(x, own[f"{prefix}{n}_proj.weight"]) for n in ("gate", "up"))
    return F.linear(F.silu(gate) * up, own[f"{prefix}down_proj.weight"])


def moe(
    own: Weights, config: TrinityConfig, x: torch.Tensor, selected: torch.Tensor
) -> torch.Tensor:
    """Shared and routed experts of ``x`` ``[b, s, d]``.  Source: report eq 15-18."""
    rows = x.transpose(0, 1).flatten(0, 1)  # Megatron's order of the tokens: [s, b]
    scores = torch.sigmoid(F.linear(rows, own["mlp.router.gate.weight"])) * selected
    probs = config.moe_router_topk_scaling_factor * scores / scores.sum(-1, keepdim=True)
    output = torch.zeros_like(rows)
    for expert in range(selected.shape[1]):
        gate, up = F.linear(rows, own["mlp.experts.gate_up_proj"][expert]).chunk(2, dim=-1)
        result = F.linear(F.silu(gate) * up, own["mlp.experts.down_proj"][expert])
        output = output + probs[:, expert, None] * result
    routed = output.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
    return _swiglu(own, "mlp.shared_experts.", x) + routed
