"""Weight gradients that the product adds to ``main_grad``, on this device, against float64."""

import pytest
import torch

from tests.gpu.conftest import Record
from trinity_megatron.model.weight_gradients import add_weight_gradient

# Half a unit in the last place of a sum in bf16, twice; a sum over 512 tokens in fp32.
BOUNDS = {torch.bfloat16: 2**-7, torch.float32: 1e-5}


@pytest.mark.parametrize("sum_dtype", BOUNDS, ids=str)
def test_two_micro_batches_are_added(
    sum_dtype: torch.dtype, device: torch.device, record: Record
) -> None:
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(256, 384, dtype=sum_dtype, device=device)
    exact = torch.zeros(256, 384, dtype=torch.float64)
    for _ in range(2):
        inputs = torch.randn(512, 384, generator=generator).bfloat16()
        grad = torch.randn(512, 256, generator=generator).bfloat16()
        add_weight_gradient(inputs.to(device), grad.to(device), total)
        exact += grad.double().t() @ inputs.double()
    error = float((total.cpu().double() - exact).abs().max() / exact.abs().max())
    record("weight gradient", error, BOUNDS[sum_dtype])
