"""RMSNorm in bf16 on this device against float64, and against what is computed in fp32 by hand."""

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.conftest import Record
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.norms import TrinityRMSNorm, rms_norm_in_fp32
from trinity_megatron.model.presets import trinity_preset

EPS = 1e-5


def errors(results: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> list[float]:
    """Norm of the error over the norm of the exact tensor, each."""
    return [
        float((one.double() - other).norm() / other.norm())
        for one, other in zip(results, exact, strict=True)
    ]


@pytest.fixture(scope="module")
def config() -> TrinityConfig:
    return trinity_preset("large", bf16=True, params_dtype=torch.bfloat16)


@pytest.mark.parametrize(("rows", "size"), [(512, 3072), (65536 + 128, 128)])
def test_norm_is_as_exact_as_in_fp32(
    rows: int, size: int, config: TrinityConfig, device: torch.device, record: Record
) -> None:
    """Few rows, one sum of the gain's gradient; and so many that it takes two."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, size, generator=generator).to(device).bfloat16() for _ in "xg")
    gain = torch.rand(size, generator=generator).to(device).bfloat16() + 0.5
    module = TrinityRMSNorm(config, size, EPS).to(device)

    def run(function: object, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [each.detach().clone().requires_grad_() for each in inputs]
        y = function(*leaves)  # type: ignore[operator]
        return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    exact = run(lambda x, w: F.rms_norm(x, (size,), w, EPS), x.double(), gain.double())
    by_hand = errors(run(lambda x, w: rms_norm_in_fp32(x, w, eps=EPS), x, gain), exact)
    names = ("output", "gradient", "gradient of the gain")
    for name, error, bound in zip(names, errors(run(ours, x, gain), exact), by_hand, strict=True):
        # Another order of the sums rounds another few entries the other way.
        record(name, error, 1.02 * bound)
