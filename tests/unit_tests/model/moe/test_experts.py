"""Grouped experts against one expert at a time."""

import pytest
import torch
import torch.nn.functional as F

from trinity_megatron.model.moe.experts import grouped_swiglu_experts

HIDDEN, FFN = 16, 8


def loop(
    rows: torch.Tensor,
    probs: torch.Tensor,
    counts: torch.Tensor,
    fc1: torch.Tensor,
    fc2: torch.Tensor,
) -> torch.Tensor:
    """Report eq 15: the weight multiplies the expert's output."""
    outputs = []
    parts = zip(rows.split(counts.tolist()), probs.split(counts.tolist()), strict=True)
    for expert, (x, g) in enumerate(parts):
        gate, up = fc1[expert, :FFN], fc1[expert, FFN:]
        outputs.append(g[:, None] * ((F.silu(x @ gate.T) * (x @ up.T)) @ fc2[expert].T))
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", [[3, 5, 2, 6], [0, 16, 0, 0], [7, 0, 9, 0], [0, 0, 0, 0]])
def test_equals_the_loop(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(sum(counts) + counts[0])
    loads = torch.tensor(counts)
    tensors = {
        "rows": torch.randn(sum(counts), HIDDEN, generator=generator),
        "probs": torch.rand(sum(counts), generator=generator),
        "fc1": torch.randn(4, 2 * FFN, HIDDEN, generator=generator) / HIDDEN**0.5,
        "fc2": torch.randn(4, HIDDEN, FFN, generator=generator) / FFN**0.5,
    }
    ours = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    exact = {name: t.double().requires_grad_() for name, t in tensors.items()}
    output = grouped_swiglu_experts(ours["rows"], ours["probs"], loads, ours["fc1"], ours["fc2"])
    expected = loop(exact["rows"], exact["probs"], loads, exact["fc1"], exact["fc2"])
    # fp32 sums of 16 products of the size of one against float64.
    options = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(output.double(), expected, **options)
    weights = torch.randn(output.shape, generator=generator)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, tensor in ours.items():
        assert tensor.grad is not None, name
        torch.testing.assert_close(tensor.grad.double(), exact[name].grad, **options, msg=name)
    for expert, load in enumerate(counts):
        assert bool(ours["fc1"].grad[expert].any()) == bool(load)


@pytest.mark.parametrize("ffn", [FFN, 3])  # grouped_mm wants multiples of four numbers
@pytest.mark.parametrize("counts", [{3: 1}, {0: 1, 11: 1}, {2: 2, 7: 1}, {}])
def test_a_few_rows_without_gradients(counts: dict[int, int], ffn: int) -> None:
    """A step of generation: most of the experts have no row."""
    generator = torch.Generator().manual_seed(4)
    loads = torch.tensor([counts.get(expert, 0) for expert in range(12)])
    rows = torch.randn(int(loads.sum()), HIDDEN, generator=generator)
    probs = torch.rand(len(rows), generator=generator)
    fc1 = torch.randn(12, 2 * ffn, HIDDEN, generator=generator) / HIDDEN**0.5
    fc2 = torch.randn(12, HIDDEN, ffn, generator=generator) / ffn**0.5
    with torch.no_grad():
        few = grouped_swiglu_experts(rows, probs, loads, fc1, fc2)
    grouped = grouped_swiglu_experts(rows, probs, loads, fc1, fc2)  # with gradients
    assert few.shape == (len(rows), HIDDEN)
    torch.testing.assert_close(few, grouped, rtol=1e-5, atol=2e-6)
