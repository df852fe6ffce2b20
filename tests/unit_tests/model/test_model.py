"""The whole model against transformers' ``AfmoeForCausalLM`` with the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.reference.hf_afmoe import hf_model, hf_state_dict

SEQUENCE = 24


def perturb(model: torch.nn.Module) -> None:
    """Gains that are not one and expert biases that change who is selected."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.1 if name.endswith("expert_bias") else 0.3))


def batch(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocab_size, (2, SEQUENCE), generator=generator)
    return tokens, torch.arange(SEQUENCE).expand(2, -1)


CONFIGS = {
    "window_shorter": {},
    "window_longer": {"window_size": (SEQUENCE + 9, 0)},
    "window_of_one": {"window_size": (0, 0)},
    "no_dense_layer": {"num_dense_layers": 0},
    "two_dense_layers": {"num_dense_layers": 2, "num_layers": 5},
    "six_layers": {"num_layers": 6},
    "one_layer": {"num_layers": 1, "num_dense_layers": 0},
    "global_every_second": {"num_layers": 3, "global_attn_every_n_layers": 2},
    "no_grouped_queries": {"num_query_groups": 4},
    "one_key_head": {"num_query_groups": 1},
    "wide_heads": {"kv_channels": 32},
    "top_one": {"moe_router_topk": 1},
    "top_all": {"moe_router_topk": 8},
    "two_shared_experts": {"moe_shared_expert_intermediate_size": 48},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, build: Callable[..., Any]) -> None:
    model = build(**CONFIGS[name]).eval()
    perturb(model)
    twin = hf_model(model).eval()
    tokens, positions = batch(model.config.vocab_size)
    with torch.no_grad():
        logits, expected = model(tokens, positions, None), twin(tokens).logits
    # fp32 through some ten sums over 64 to 128 products; the logits are of the size of one.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
    assert logits.std() > 0.1
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())


def test_the_expert_bias_matters(build: Callable[..., Any]) -> None:
    # Otherwise the comparison above would not see a router without it.
    model = build().eval()
    tokens, positions = batch(model.config.vocab_size)
    with torch.no_grad():
        before = model(tokens, positions, None)
        for name, parameter in model.named_parameters():
            if name.endswith("expert_bias"):
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()))
        assert (model(tokens, positions, None) - before).abs().max() > 1e-3


def test_gradients_equal_transformers(build: Callable[..., Any]) -> None:
    model = build()
    perturb(model)
    twin = hf_model(model)
    tokens, positions = batch(model.config.vocab_size)
    labels = tokens.roll(-1, dims=1)
    model(tokens, positions, None, labels=labels).mean().backward()
    logits = twin(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("expert_bias"):
                assert parameter.grad is not None, name
                parameter.copy_(parameter.grad)
    ours, compared = hf_state_dict(model), 0
    for name, parameter in twin.named_parameters():
        if name.endswith("expert_bias"):
            continue
        # fp32 backward through the layers, relative to the largest entry of the tensor.
        scale = float(parameter.grad.abs().max())
        assert scale > 0, name
        error = float((ours[name] - parameter.grad).abs().max()) / scale
        assert error < 1e-4, (name, error)
        compared += 1
    assert compared == len(ours) - model.config.num_moe_layers
