"""Muon against torch.optim.Muon, and against its equations in float64, over twenty steps."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from trinity_megatron.optimizer.muon import Muon

SIMPLE = (3.4445, -4.7750, 2.0315)
STEPS = 20
# Wide, tall, square, a row, a column; two of one shape, which are orthogonalized together.
SHAPES = [(24, 60), (60, 24), (32, 32), (24, 60), (1, 20), (20, 1), (128, 64)]
# adjust_lr_fn of torch -> our scale.
SCALES = {"original": "shape_scaling", "match_rms_adamw": "rms_match"}
NESTEROV = pytest.mark.parametrize("nesterov", [False, True])
ADJUST = pytest.mark.parametrize("adjust_lr_fn", SCALES)


def parameters(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.manual_seed(0)
    return [
        Parameter(0.02 * torch.randn(*shape, generator=generator, dtype=dtype)) for shape in SHAPES
    ]


def gradients(*, integers: bool) -> Iterator[list[Tensor]]:
    generator = torch.manual_seed(1)
    for _ in range(STEPS):
        if integers:
            yield [torch.randint(-7, 8, s, generator=generator).float() for s in SHAPES]
        else:
            yield [torch.randn(*s, generator=generator) for s in SHAPES]


def largest(tensors: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(tensors, others, strict=True))


def run_both(
    adjust_lr_fn: str, *, lr: float, momentum: float, nesterov: bool
) -> tuple[float, float]:
    """Largest difference of a parameter between the two, and how far it is from where it began."""
    begin = parameters(torch.float32)
    ours, theirs = copy.deepcopy(begin), copy.deepcopy(begin)
    settings = {"lr": lr, "momentum": momentum, "weight_decay": 0.1, "nesterov": nesterov}
    optimizer = Muon(
        ours,
        coefficients="simple",
        dtype=torch.bfloat16,  # torch knows nothing else
        scale=SCALES[adjust_lr_fn],
        **settings,
    )
    other = torch.optim.Muon(
        theirs, ns_coefficients=SIMPLE, ns_steps=5, adjust_lr_fn=adjust_lr_fn, **settings
    )
    for grads in gradients(integers=False):
        for mine, its, grad in zip(ours, theirs, grads, strict=True):
            mine.grad, its.grad = grad, grad.clone()
        optimizer.step()
        other.step()
    return largest(ours, theirs), min(
        (p - q).abs().max().item() for p, q in zip(ours, begin, strict=True)
    )


@NESTEROV
@ADJUST
@pytest.mark.parametrize("lr", [1e-3, 2e-2])
@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_equals_torch(adjust_lr_fn: str, lr: float, momentum: float, nesterov: bool) -> None:
    """The same settings, twenty steps: the products in bfloat16 are rounded alike.

    Without bf16 instructions, and with tiles (AMX), torch multiplies single matrices and batches by
    different kernels, which round at different places: then the bound is four bf16 roundings of one
    step's update.
    """
    difference, movement = run_both(adjust_lr_fn, lr=lr, momentum=momentum, nesterov=nesterov)
    assert movement > lr
    largest_scale = {"original": math.sqrt(2), "match_rms_adamw": 0.2 * math.sqrt(128)}
    rounded_apart = 4 * 2**-8 * lr * largest_scale[adjust_lr_fn]
    is_alike = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    assert difference <= (1e-5 if is_alike else rounded_apart)


def newton_schulz(matrix: Tensor) -> Tensor:
    x = matrix / matrix.norm()
    a, b, c = SIMPLE
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@NESTEROV
@ADJUST
def test_equals_the_equations_in_float64(adjust_lr_fn: str, nesterov: bool) -> None:
    """Again exact momenta, as ours is float32; everything else is float64, one by one."""
    lr, decay, momentum = 0.02, 0.1, 0.5
    ours = parameters(torch.float64)
    expected = [p.detach().clone() for p in ours]
    momenta = [torch.zeros_like(value) for value in expected]
    optimizer = Muon(
        ours,
        lr=lr,
        momentum=momentum,
        weight_decay=decay,
        nesterov=nesterov,
        coefficients="simple",
        dtype=torch.float64,
        scale=SCALES[adjust_lr_fn],
    )
    for grads in gradients(integers=True):
        for param, value, buffer, grad in zip(ours, expected, momenta, grads, strict=True):
            param.grad = grad.double()
            buffer.mul_(momentum).add_((1 - momentum) * grad.double())
            rows, columns = value.shape
            factor = 0.2 * math.sqrt(max(rows, columns))
            if adjust_lr_fn == "original":
                factor = math.sqrt(max(1, rows / columns))
            update = newton_schulz(
                (1 - momentum) * grad.double() + momentum * buffer if nesterov else buffer
            )
            value.mul_(1 - lr * decay).sub_(lr * factor * update)
        optimizer.step()
    assert largest(ours, expected) < 1e-11
