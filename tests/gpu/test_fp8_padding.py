"""FP8 experts with numbers of rows around every size to which they are padded."""

import contextlib
from typing import Any

import pytest
import torch

from tests.gpu.conftest import Record
from tests.gpu.models import FP8_WIDTH, build_model, relative_error
from trinity_megatron.model.fp8 import FP8_RECIPES, supported_recipes
from trinity_megatron.model.moe.experts import grouped_swiglu_experts

pytestmark = [pytest.mark.gpu, pytest.mark.te]

ROWS = [0, 1, 15, 16, 17, 127, 128, 129]
# E4M3 has 3 bits behind the point: rounding is off by 2**-4 / sqrt(3) = 3.6% at most and 2.6% on
# average over a binade.  Both factors of both products are rounded: 2.6% * sqrt(4) = 5.2%, and the
# activation multiplies two of them.  Doubled.
OUTPUT_BOUND = 0.12
# Gradients are E5M2, which has 2 bits: 5.2% each.
GRADIENT_BOUND = 0.24


def run(experts: Any, recipe: str | None, rows: torch.Tensor, probs: torch.Tensor) -> Any:
    """Output and input gradient; delayed scaling has seen the values once before."""
    from megatron.core.fp8_utils import get_fp8_context

    counts = torch.tensor(ROWS)
    for _ in range(2):
        inputs = rows.clone().requires_grad_()
        context = get_fp8_context(experts.config, 1) if recipe else contextlib.nullcontext()
        with context:
            output, _ = experts(inputs, counts, probs)
        output.float().square().sum().backward()
    return output.detach(), inputs.grad


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_every_number_of_rows(recipe: str, device: torch.device, record: Record) -> None:
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    if recipe not in supported_recipes(torch.cuda.get_device_capability(), cuda=version):
        pytest.skip(f"this GPU does not run the recipe {recipe}")
    fields = {"bf16": True, "transformer_impl": "transformer_engine"}
    model = build_model(device, fp8="hybrid", fp8_recipe=recipe, **fields)
    experts = model.decoder.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(ROWS), FP8_WIDTH, generator=generator).to(device, torch.bfloat16)
    probs = torch.rand(sum(ROWS), generator=generator).to(device)
    output, gradient = run(experts, recipe, rows, probs)
    inputs = rows.clone().requires_grad_()
    weights = experts.linear_fc1.weight.detach(), experts.linear_fc2.weight.detach()
    expected = grouped_swiglu_experts(inputs, probs, torch.tensor(ROWS, device=device), *weights)
    expected.float().square().sum().backward()
    start = 0
    for count in ROWS:  # an expert that gets another's rows would drown in the mean
        if count:
            own = slice(start, start + count)
            record(
                f"output, {count} rows", relative_error(output[own], expected[own]), OUTPUT_BOUND
            )
            error = relative_error(gradient[own], inputs.grad[own])
            record(f"gradient, {count} rows", error, GRADIENT_BOUND)
        start += count
