"""AdamW whose form follows the device."""

import copy

import pytest
import torch

from trinity_megatron.optimizer.adamw import DeviceAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def train(
    optimizer_type: type[torch.optim.AdamW], device: str, steps: int, state: dict | None = None
) -> tuple[torch.Tensor, dict]:
    """Weights after some steps on gradients that do not depend on them, and the state."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(7, 5, generator=generator, dtype=torch.float32)
    weight = torch.nn.Parameter(start.to(device))
    optimizer = optimizer_type([weight], **SETTINGS)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for _ in range(steps):
        weight.grad = torch.randn(7, 5, generator=generator).to(device)
        optimizer.step()
    return weight.detach().cpu(), optimizer.state_dict()


def test_it_is_torchs_on_a_cpu() -> None:
    expected, _ = train(torch.optim.AdamW, "cpu", 5)
    found, state = train(DeviceAdamW, "cpu", 5)
    assert torch.equal(found, expected)
    assert state["param_groups"][0]["fused"] is None


def test_a_state_from_a_gpu_does_not_decide() -> None:
    _, state = train(DeviceAdamW, "cpu", 2)
    expected, _ = train(DeviceAdamW, "cpu", 2, state)
    state["param_groups"][0]["fused"] = True
    found, after = train(DeviceAdamW, "cpu", 2, state)
    assert torch.equal(found, expected) and after["param_groups"][0]["fused"] is None


@pytest.mark.gpu
def test_fused_on_a_gpu() -> None:
    expected, state = train(torch.optim.AdamW, "cpu", 5)
    found, _ = train(DeviceAdamW, "cuda", 5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    train(DeviceAdamW, "cuda", 1, state)  # a step count on the host
