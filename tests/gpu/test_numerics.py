"""What this device computes: ``local`` against float64, Transformer Engine against both."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.gpu import float64
from tests.gpu.conftest import Record
from tests.gpu.models import batch, build_model, relative_error
from tests.reference.hf_afmoe import hf_state_dict

# Norm of the error over the norm of the float64 result.  fp32: 24 bits through some thirty sums.
# bf16: 8 bits, every tensor is rounded by up to 2**-9, and some forty roundings add up in squares:
# 2**-9 / sqrt(3) * sqrt(40) = 0.7%; twice that for the way back.  Three and four times that, for
# the parameter whose gradient is worst.
LOGITS_BOUND = {"fp32": 1e-5, "bf16": 0.02}
GRADIENT_BOUND = {"fp32": 1e-4, "bf16": 0.06}
# Of a model whose experts are other than they should be.
FAR = 0.2


class Result:
    """Logits, selections and gradients of one forward and backward pass of a model of ours."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.selected: list[torch.Tensor] = []
        hooks = [
            module.register_forward_hook(
                lambda module, inputs, output: self.selected.append(output[1].cpu())
            )
            for name, module in model.named_modules()
            if name.endswith("mlp.router")
        ]
        tokens, positions = batch(device)
        logits = model(tokens, positions, None)
        for hook in hooks:
            hook.remove()
        self.logits = logits.detach()
        labels = tokens.roll(-1, dims=1)
        F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
        self.weights = {k: v.double().cpu() for k, v in hf_state_dict(model).items()}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    parameter.copy_(parameter.grad)
        self.gradients = hf_state_dict(model)

    def exact(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same in float64 on the CPU, with this model's weights and selections."""
        weights = {name: tensor.requires_grad_() for name, tensor in self.weights.items()}
        tokens, _ = batch(torch.device("cpu"))
        logits = float64.logits(weights, self.model.config, tokens, self.selected)
        F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, dims=1).flatten()).backward()
        gradients = {n: w.grad for n, w in weights.items() if not n.endswith("expert_bias")}
        return logits.detach(), gradients

    def errors(self) -> tuple[float, float]:
        """Relative error of the logits, and the largest one of any parameter's gradient."""
        logits, gradients = self.exact()
        errors = {n: relative_error(self.gradients[n], exact) for n, exact in gradients.items()}
        return relative_error(self.logits, logits), max(errors.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_local_equals_float64(precision: str, device: torch.device, record: Record) -> None:
    result = Result(build_model(device, bf16=precision == "bf16"), device)
    logits, gradient = result.errors()
    record("logits", logits, LOGITS_BOUND[precision])
    record("gradients", gradient, GRADIENT_BOUND[precision])


def test_the_comparison_sees_a_wrong_expert(device: torch.device) -> None:
    result = Result(build_model(device), device)
    result.selected[0] = result.selected[0].roll(1, dims=1)
    assert result.errors()[1] > FAR


@pytest.mark.parametrize(
    "implementation",
    ["local", pytest.param("transformer_engine", marks=[pytest.mark.gpu, pytest.mark.te])],
)
def test_experts_without_tokens(implementation: str, device: torch.device, record: Record) -> None:
    model = build_model(device, bf16=True, transformer_impl=implementation)
    with torch.no_grad():  # all tokens to the first two experts of eight
        for name, parameter in model.named_parameters():
            if name.endswith("expert_bias"):
                parameter.copy_(torch.tensor([9.0, 9.0, *[0.0] * 6]))
    result = Result(model, device)
    assert all(chosen.sum(0).tolist()[2:] == [0] * 6 for chosen in result.selected)
    logits, gradient = _errors_of_used(result)
    record("logits", logits, LOGITS_BOUND["bf16"])
    record("gradients", gradient, GRADIENT_BOUND["bf16"])


def _errors_of_used(result: Result) -> tuple[float, float]:
    """As ``errors``; the gradients of experts without tokens must be zeros."""
    logits, gradients = result.exact()
    errors = []
    for name, exact in gradients.items():
        ours = result.gradients[name]
        if ".experts." in name and "shared" not in name:
            assert not ours[2:].any() and not exact[2:].any(), name
            ours, exact = ours[:2], exact[:2]
        errors.append(relative_error(ours, exact))
    return relative_error(result.logits, logits), max(errors)


@pytest.mark.gpu
@pytest.mark.te
def test_transformer_engine_is_as_exact_as_local(device: torch.device, record: Record) -> None:
    local = build_model(device, bf16=True)
    model = build_model(device, bf16=True, transformer_impl="transformer_engine")
    missing = model.load_state_dict(local.state_dict(), strict=False).missing_keys
    assert all(name.endswith("_extra_state") for name in missing), missing
    local_errors, errors = Result(local, device).errors(), Result(model, device).errors()
    # Other kernels round elsewhere: up to twice the error of the local layers.
    for name, error, reference in zip(("logits", "gradients"), errors, local_errors, strict=True):
        record(name, error, 2 * reference)
