"""What an operation moves and multiplies, and the least time that it can take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trinity_megatron.doctor.step_floor import GPUS, StepFloor, floor_table, group_of

A, B, C = torch.ones(8, 16), torch.ones(16, 4), torch.ones(8, 4)
FP32 = 4


def count(run: Callable[[], Any], **kwargs: Any) -> StepFloor:
    floor = StepFloor(lambda module: 5.0, **kwargs)
    with floor:
        run()
    return floor


@pytest.mark.parametrize(
    ("run", "elements", "flops"),
    [
        (lambda: A @ B, 8 * 16 + 16 * 4 + 8 * 4, 2 * 8 * 16 * 4),
        (lambda: A.t(), 0, 0),
        (lambda: torch.empty(1000), 0, 0),
        (lambda: A + 1.0, 2 * 8 * 16, 0),
        (lambda: A + A, 2 * 8 * 16, 0),  # one tensor, read once
        (lambda: A.clone().add_(1.0), 4 * 8 * 16, 0),  # reads and writes its own
        (lambda: A[:1].expand(8, 16).contiguous(), 16 + 8 * 16, 0),
        (lambda: torch.addmm(C, A, B, out=C), 8 * 16 + 16 * 4 + 2 * 8 * 4, 2 * 8 * 16 * 4),
        (lambda: torch.baddbmm(torch.ones(1, 1, 1), A[None], B[None]), None, 2 * 8 * 16 * 4),
    ],
)
def test_an_operation(run: Callable[[], Any], elements: int | None, flops: int) -> None:
    floor = count(run)
    costs = floor.groups.values()
    if elements is not None:
        assert sum(cost.num_bytes for cost in costs) == elements * FP32
    assert sum(sum(cost.flops.values()) for cost in costs) == flops


def test_the_rate_of_a_sum_is_that_of_its_product() -> None:
    """A bf16 product into an fp32 sum; meta tensors, as a CPU has no such operation."""
    left, right, total = (
        torch.empty(8, 8, dtype=dtype, device="meta")
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    floor = count(lambda: torch.addmm(total, left, right, out_dtype=torch.float32, out=total))
    (cost,) = floor.groups.values()
    assert dict(cost.flops) == {torch.bfloat16: 2 * 8**3}
    assert cost.num_bytes == 2 * 2 * 8**2 + 2 * 4 * 8**2


def test_the_floor_is_the_larger_of_both() -> None:
    (cost,) = count(lambda: A @ B).groups.values()
    rates = GPUS["H100"]
    by_bytes = cost.num_bytes / rates.bytes_per_second
    assert by_bytes > 2 * 8 * 16 * 4 / rates.flops[torch.float32]  # so small a product
    assert cost.seconds["H100"] == cost.bound_by_bytes["H100"] == by_bytes
    *_, total = floor_table({"all": cost}, "H100")
    assert total[0] == "step" and total[1] == "1"


def test_the_groups_of_a_pass() -> None:
    """Forward and backward of a product belong to the module that has it."""
    layer = torch.nn.Module()
    layer.router = torch.nn.Linear(16, 4, bias=False)
    layer.forward = lambda x: layer.router(x)

    def run() -> None:
        layer(A.clone().requires_grad_()).sum().backward()

    floor = count(run)
    assert sum(floor.groups["router"].flops.values()) == 3 * 2 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("module", "group"),
    [
        ("GPTModel.decoder.layers.3.mlp.experts", "experts"),
        ("GPTModel.decoder.layers.3.mlp.router", "router"),
        ("GPTModel.decoder.layers.3.self_attention.core_attention", "attention"),
        ("GPTModel.decoder.layers.3.self_attention.q_layernorm", "norms"),
        ("GPTModel.output_layer", "LM head and loss"),
        ("GPTModel", "LM head and loss"),
        ("Global", "between the passes"),
    ],
)
def test_the_group_of_a_module(module: str, group: str) -> None:
    assert group_of(module) == group


def test_launches_are_those_of_the_device() -> None:
    launches = iter(range(0, 100, 7))
    floor = count(lambda: A + 1.0, count_launches=lambda: next(launches))
    assert sum(cost.launches for cost in floor.groups.values()) == 7
