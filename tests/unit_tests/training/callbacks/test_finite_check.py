"""What is no number is found wherever a checkpoint would keep it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from trinity_megatron.training.callbacks.finite_check import find_spoilt  # noqa: E402


def make_state() -> tuple[list[torch.nn.Module], Any]:
    """A model in two chunks with a buffer, and two optimizers with state."""
    chunks = [torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(4).bfloat16()]
    chunks.append(torch.nn.Linear(0, 2))  # no elements
    parts = []
    for chunk in chunks:
        adam = torch.optim.AdamW(chunk.parameters())
        for param in chunk.parameters():
            param.grad = torch.ones_like(param)
        adam.step()
        parts.append(SimpleNamespace(optimizer=adam))
    return chunks, SimpleNamespace(chained_optimizers=parts)


def spoilt_names(*state: Any) -> list[str]:
    names, is_spoilt = find_spoilt(*state)
    assert is_spoilt.dtype == torch.bool and is_spoilt.shape == (len(names),)
    return [name for name, is_bad in zip(names, is_spoilt, strict=True) if is_bad]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_each_kind_of_tensor(value: float) -> None:
    chunks, optimizer = make_state()
    assert spoilt_names(chunks, optimizer) == []
    assert spoilt_names(chunks, None) == []
    assert spoilt_names([], None) == []
    linear, norm = chunks[:2]
    with torch.no_grad():
        linear.weight[1, 2] = value
        norm.running_var[3] = value
        optimizer.chained_optimizers[0].optimizer.state[linear.bias]["exp_avg_sq"][0] = value
    assert spoilt_names(chunks, optimizer) == [
        "weight",
        "running_var",
        "exp_avg_sq of a parameter of 2",
    ]


def test_large_numbers_are_numbers() -> None:
    chunks, optimizer = make_state()
    with torch.no_grad():
        for chunk in chunks:
            for param in chunk.parameters():
                param.fill_(torch.finfo(param.dtype).max)
    assert spoilt_names(chunks, optimizer) == []
