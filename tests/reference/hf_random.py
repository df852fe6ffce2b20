"""Small AFMoE checkpoints of transformers with random shapes and random weights."""

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AfmoeConfig, AfmoeForCausalLM

NUM_CONFIGS = 32


def random_config(seed: int) -> AfmoeConfig:
    """A config whose sizes fit nothing in particular; the same for the same seed."""
    draw = random.Random(seed)
    head_dim, groups = draw.choice([16, 24, 32, 64, 128]), draw.choice([1, 2, 3, 4])
    heads = groups * draw.choice([1, 2, 3, 4, 8])
    experts = draw.choice([4, 6, 8, 16, 32])
    layers = draw.randint(4, 12) if head_dim < 64 else draw.randint(4, 6)
    width = heads * head_dim
    values: dict[str, Any] = {
        "vocab_size": draw.randint(70, 300),
        # Every third as wide as the heads together, as in Nano; else not, as in Mini and Large.
        "hidden_size": width
        if seed % 3 == 0 and width <= 256
        else draw.choice([20, 48, 64, 72, 96]),
        "intermediate_size": draw.choice([40, 96, 132]),
        "moe_intermediate_size": draw.choice([8, 18, 24, 33, 64]),
        "num_hidden_layers": layers,
        "num_dense_layers": draw.randint(0, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "num_experts": experts,
        "num_experts_per_tok": draw.randint(1, min(8, experts)),
        "num_shared_experts": draw.choice([1, 1, 2]),
        "route_scale": draw.choice([1.0, 2.448, 2.826]),
        "global_attn_every_n_layers": draw.choice([4, 4, 3, 2]),
        "sliding_window": draw.choice([1, 5, 16, 33, 64, 500]),
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "mup_enabled": draw.random() < 0.7,
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([10000.0, 500000.0])},
        "max_position_embeddings": 512,
    }
    return AfmoeConfig(**values)


def random_model(config: AfmoeConfig, seed: int) -> AfmoeForCausalLM:
    """A model with weights of a sensible size, gains that are not one and expert biases."""
    generator = torch.Generator().manual_seed(seed)
    model = AfmoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                bias = name.endswith("expert_bias")
                parameter.copy_(0.1 * noise if bias else 1 + 0.3 * noise)
            else:
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(scale * noise)
    # The loop over experts: grouped_mm refuses sizes that are no multiple of 16 bytes.
    model.set_experts_implementation("eager")
    return model.eval()


def random_tokens(config: AfmoeConfig, seed: int) -> torch.Tensor:
    """A batch of an odd length; int64 ``[b, s]``."""
    draw = random.Random(seed)
    shape = (draw.choice([1, 2, 3]), draw.choice([7, 29, 37, 61, 83]))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def save_as_bf16(model: AfmoeForCausalLM, folder: Path, **options: Any) -> None:
    """Save as the hub has it: bf16, the expert bias in fp32."""
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if "expert_bias" in n}
    model.to(torch.bfloat16)
    for name, bias in biases.items():
        model.get_parameter(name).data = bias
    model.save_pretrained(folder, **options)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face checkpoint."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
