"""The loss over the vocabulary of Trinity Large on this device, against float64."""

import pytest
import torch

from tests.gpu.conftest import Record
from tests.unit_tests.model.loss_cases import COEFF, TOLERANCE
from trinity_megatron.model.cross_entropy import vocab_parallel_cross_entropy
from trinity_megatron.model.lm_head_loss import z_loss

NUM_TOKENS, VOCAB_SIZE = 16, 200192


def far(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error, of the largest entry."""
    return float((actual.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_equals_float64(dtype: torch.dtype, device: torch.device, record: Record) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(NUM_TOKENS, 1, VOCAB_SIZE, generator=generator)
    values = values.to(device, dtype)
    target = torch.randint(VOCAB_SIZE, (NUM_TOKENS, 1), generator=generator).to(device)
    leaf, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    loss, logsumexp, statistics = vocab_parallel_cross_entropy(
        leaf.clone(), target, overwrite_logits=True, collect_statistics=True
    )
    (loss + z_loss(logsumexp, COEFF)).sum().backward()
    exact_logsumexp = exact.logsumexp(dim=-1)
    exact_loss = exact_logsumexp - exact.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    (exact_loss + z_loss(exact_logsumexp, COEFF)).sum().backward()
    assert leaf.grad is not None and exact.grad is not None and statistics is not None
    record("loss", far(loss, exact_loss), TOLERANCE)
    record("logsumexp", far(logsumexp, exact_logsumexp), TOLERANCE)
    # bf16: 8 bits, rounded once, to the nearest.
    rounding = 2**-8 if dtype == torch.bfloat16 else 0.0
    error = (leaf.grad.double() - exact.grad).abs() - rounding * exact.grad.abs()
    record("gradient", float(error.max() / exact.grad.abs().max()), TOLERANCE)
    total, size = float(statistics.logit.total), float(values.double().abs().sum())
    record("sum of logits", abs(total - float(values.double().sum())) / size, TOLERANCE)
    assert statistics.logit.maximum == values.max()
