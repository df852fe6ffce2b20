"""Small Trinity models with sizes that every kernel takes, and how errors are measured."""

from typing import Any

import torch

FP8_WIDTH = 128  # the block of the blockwise recipe
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "num_dense_layers": 1,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 64,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": FP8_WIDTH,
    "moe_shared_expert_intermediate_size": FP8_WIDTH,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_load_balancing_type": "none",
    "window_size": (15, 0),
    "vocab_size": 256,
}
SEQUENCE = 64


def build_model(device: torch.device, **overrides: Any) -> Any:
    """An initialised model of ``SMALL`` with other fields; bf16 with ``bf16=True``."""
    from megatron.core.models.gpt import GPTModel

    from trinity_megatron.model.architecture import TRINITY_ARCHITECTURE
    from trinity_megatron.model.config import TrinityConfig
    from trinity_megatron.model.initialization import initialize_parameters
    from trinity_megatron.model.layer_specs import get_trinity_layer_spec

    dtype = torch.bfloat16 if overrides.get("bf16") else torch.float32
    values = {"transformer_impl": "local", "params_dtype": dtype, "pipeline_dtype": dtype}
    config = TrinityConfig(**{**TRINITY_ARCHITECTURE, **SMALL, **values, **overrides})
    model = GPTModel(
        config,
        get_trinity_layer_spec(config),
        vocab_size=config.vocab_size,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    (model,) = initialize_parameters([model.to(device)])
    perturb(model)
    return model


def perturb(model: torch.nn.Module) -> None:
    """Gains that are not one and expert biases that change who is selected."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 0.1 if name.endswith("expert_bias") else 0.3
                parameter.add_((noise * scale).to(parameter.device))


def batch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions, ``[2, SEQUENCE]``."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(SMALL["vocab_size"], (2, SEQUENCE), generator=generator)
    return tokens.to(device), torch.arange(SEQUENCE, device=device).expand(2, -1)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    difference = ours.detach().double().cpu() - exact.detach().double().cpu()
    return float(difference.norm() / exact.detach().double().norm())
