"""Sorting tokens by expert and back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trinity_megatron.model.moe.experts import grouped_swiglu_experts
from trinity_megatron.model.moe.token_dispatcher import (
    LocalTokenDispatcher,
    pad_rows,
    sort_by_expert,
)

TOPK, EXPERTS, HIDDEN = 2, 8, 64


@pytest.fixture
def dispatcher(build: Callable[..., Any], fp32_in_mkl: None) -> LocalTokenDispatcher:
    found = build().decoder.layers[1].mlp.token_dispatcher
    assert isinstance(found, LocalTokenDispatcher)
    return found


def random_routing(num_tokens: int, seed: int, *, experts: int = EXPERTS) -> tuple:
    """Routing over the first ``experts``: the others stay empty."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    scores[:, experts:] = 0
    routing_map = torch.zeros_like(scores, dtype=torch.bool)
    routing_map.scatter_(1, scores.topk(TOPK).indices, True)
    hidden = torch.randn(num_tokens // 2, 2, HIDDEN, generator=generator)
    return hidden, routing_map, scores * routing_map


@pytest.mark.parametrize("experts", [EXPERTS, 3, TOPK])
def test_equals_plain_indexing(experts: int, dispatcher: LocalTokenDispatcher) -> None:
    hidden, routing_map, probs = random_routing(20, experts, experts=experts)
    ours, plain = (
        [hidden.clone().requires_grad_(), probs.clone().requires_grad_()] for _ in range(2)
    )
    rows, weights = dispatcher.dispatch_preprocess(ours[0], routing_map, ours[1])
    rows, weights = dispatcher.token_dispatch(rows, weights)
    rows, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
    assert torch.equal(counts, routing_map.sum(0))

    flat, expected_rows, expected_weights = plain[0].view(-1, HIDDEN), [], []
    for expert in range(EXPERTS):
        tokens = routing_map[:, expert].nonzero().view(-1)
        expected_rows.append(flat[tokens])
        expected_weights.append(plain[1][tokens, expert])
    assert torch.equal(rows, torch.cat(expected_rows))
    assert torch.equal(weights, torch.cat(expected_weights))

    # A transformation that is another one for each row, as the experts' is.
    scale = torch.linspace(0.5, 1.5, rows.shape[0])[:, None]
    output = dispatcher.combine_preprocess(rows * scale * weights[:, None])
    output = dispatcher.combine_postprocess(dispatcher.token_combine(output))
    transformed = torch.cat(expected_rows) * scale * torch.cat(expected_weights)[:, None]
    token_of_row = routing_map.t().nonzero()[:, 1]
    expected = torch.zeros_like(flat).index_add(0, token_of_row, transformed)
    assert output.shape == hidden.shape
    # Sums of two fp32 numbers do not depend on their order.
    assert torch.equal(output.view(-1, HIDDEN), expected)

    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    (output * target).sum().backward()
    (expected.view_as(target) * target).sum().backward()
    # Gradients of the weights are sums over 64 products, in another order.
    for mine, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-5)


def test_inverse(dispatcher: LocalTokenDispatcher) -> None:
    hidden, routing_map, probs = random_routing(16, 0)
    rows, _ = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    # Every token comes back as often as it was sent: exactly twice itself.
    assert torch.equal(dispatcher.combine_postprocess(rows), TOPK * hidden)


@pytest.mark.parametrize("experts", [EXPERTS, 3, TOPK])
@pytest.mark.parametrize("multiple", [2, 7, 32])
def test_padding_changes_nothing(multiple: int, experts: int) -> None:
    hidden, routing_map, probs = random_routing(20, experts, experts=experts)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(EXPERTS, *shape, generator=generator)
        for shape in ((2 * 16, HIDDEN), (HIDDEN, 16))
    ]

    def run(padded: bool) -> list[torch.Tensor]:
        flat, routed, fc1, fc2 = leaves = [
            tensor.clone().requires_grad_() for tensor in (hidden.view(-1, HIDDEN), probs, *weights)
        ]
        rows = sort_by_expert(routing_map, routed, topk=TOPK)
        if padded:
            rows = pad_rows(rows, multiple)
            assert (rows.tokens_per_expert % multiple == 0).all()
            assert len(rows.token_of_row) == len(rows.weights) == rows.tokens_per_expert.sum()
            # No expert gets more than it must, and none that is empty gets any.
            assert (rows.tokens_per_expert - routing_map.sum(0) < multiple).all()
            assert (rows.weights != 0).sum() == routing_map.sum()
        output = grouped_swiglu_experts(
            flat[rows.token_of_row], rows.weights, rows.tokens_per_expert, fc1, fc2
        )[rows.rows_of_token].sum(1)
        (output * torch.linspace(-1, 1, HIDDEN)).sum().backward()
        return [output, *(leaf.grad for leaf in leaves)]

    for ours, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_dispatcher_pads_where_onednn_multiplies(
    precision: str, dispatcher: LocalTokenDispatcher
) -> None:
    torch.set_float32_matmul_precision(precision)  # what the fixture of the dispatcher undoes
    hidden, routing_map, probs = random_routing(1024, 0)
    ours, plain = (
        [hidden.clone().requires_grad_(), probs.clone().requires_grad_()] for _ in range(2)
    )
    rows, weights = dispatcher.dispatch_preprocess(ours[0], routing_map, ours[1])
    rows, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
    assert len(rows) == len(weights) == counts.sum()
    is_padded = precision == "medium"
    assert bool((counts % 32 == 0).all()) == is_padded
    assert (counts.sum() == routing_map.sum()) != is_padded
    output = dispatcher.combine_postprocess(rows.sin() * weights[:, None])
    expected = plain[0].sin() * (plain[1] * routing_map).sum(1).view(*hidden.shape[:2], 1)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    for result in (output, expected):
        (result * torch.linspace(-1, 1, HIDDEN)).sum().backward()
    for mine, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-5)


def test_dispatcher_keeps_no_graph(dispatcher: LocalTokenDispatcher) -> None:
    hidden, routing_map, probs = random_routing(20, 0)
    dispatcher.dispatch_preprocess(hidden, routing_map, probs.requires_grad_())
    kept = [value for value in vars(dispatcher).values() if torch.is_tensor(value)]
    assert len(kept) >= 3 and not any(tensor.requires_grad for tensor in kept)


def test_shared_experts_that_overlap_are_computed(build: Callable[..., Any]) -> None:
    """Megatron's dispatcher computes them then; ours would leave them out."""
    hidden = torch.randn(10, 2, HIDDEN, generator=torch.Generator().manual_seed(3))
    results = []
    for overlap in (False, True):
        layer = build(moe_shared_expert_overlap=overlap).decoder.layers[1].mlp
        assert isinstance(layer.token_dispatcher, LocalTokenDispatcher) != overlap
        output, _ = layer(hidden)
        output.square().sum().backward()
        results.append((output, layer.shared_experts.linear_fc1.weight.grad))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_one_token_is_sorted_as_among_others() -> None:
    """A step of generation has a path of its own."""
    _, routing_map, probs = random_routing(6, 11)
    for token in range(6):
        own = sort_by_expert(routing_map[token : token + 1], probs[token : token + 1], topk=TOPK)
        expected = routing_map[token].nonzero().squeeze(1)
        assert own.token_of_row.tolist() == [0] * TOPK
        assert own.rows_of_token.tolist() == [list(range(TOPK))]
        assert torch.equal(own.weights, probs[token, expected])
        assert torch.equal(own.tokens_per_expert, routing_map[token].long())
