"""The router: selection, weights, counters, balance loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trinity_megatron.model.moe.router import TrinityRouter, route
from trinity_megatron.telemetry.step_statistics import STATISTIC_NAMES, statistics_of

TOPK, SCALE = 2, 2.5


def route_oracle(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Report eq 15-18, one token at a time in float64."""
    probs = torch.zeros(logits.shape, dtype=torch.float64)
    for token, row in enumerate(logits.double()):
        scores = [1 / (1 + float(torch.exp(-z))) for z in row]
        order = sorted(range(len(scores)), key=lambda i: scores[i] + float(bias[i]), reverse=True)
        chosen = order[:TOPK]
        total = sum(scores[i] for i in chosen)
        for i in chosen:
            probs[token, i] = SCALE * scores[i] / total
    return probs


def test_route_equals_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 8, generator=generator)
    for strength in (0.0, 0.2, 5.0):
        bias = torch.randn(8, generator=generator) * strength
        probs, routing_map, scores = route(logits, bias, topk=TOPK, route_scale=SCALE)
        expected = route_oracle(logits, bias)
        assert torch.equal(routing_map, expected > 0)
        # fp32 sigmoid and quotient of numbers of the size of one.
        torch.testing.assert_close(probs.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scores, torch.sigmoid(logits), rtol=0, atol=0)


def test_the_bias_selects_but_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    probs, routing_map, scores = route(logits, bias, topk=2, route_scale=1.0)
    assert routing_map.tolist() == [[True, False, False, True]]
    expected = scores[0, [0, 3]] / scores[0, [0, 3]].sum()
    # One rounding of the quotient.
    torch.testing.assert_close(probs[0, [0, 3]], expected, rtol=0, atol=1e-7)
    # Moving a bias that changes no selection changes nothing.
    again = route(logits, bias + torch.tensor([3.0, 0, 0, 0]), topk=2, route_scale=1.0)
    assert torch.equal(again.probs, probs)


@pytest.fixture
def router(build: Callable[..., Any]) -> TrinityRouter:
    return build().decoder.layers[1].mlp.router


def test_a_cast_keeps_bias_momentum_and_counters(router: TrinityRouter) -> None:
    with torch.no_grad():
        router.expert_bias.fill_(1 / 3)
        router.expert_bias_momentum.fill_(1 / 7)
        router.local_tokens_per_expert.fill_(2**31 + 1)
    bias = router.expert_bias
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias is bias and not bias.requires_grad
    assert torch.equal(bias, torch.full((8,), 1 / 3))
    assert torch.equal(router.expert_bias_momentum, torch.full((8,), 1 / 7))
    assert torch.equal(router.local_tokens_per_expert, torch.full((8,), 2**31 + 1))
    assert router.local_tokens_per_expert.dtype == torch.int64
    router.half().float()
    assert torch.equal(bias, torch.full((8,), 1 / 3))
    saved = router.state_dict()
    assert {"expert_bias", "expert_bias_momentum"} <= set(saved)
    assert "local_tokens_per_expert" not in saved


def test_only_training_counts(router: TrinityRouter) -> None:
    hidden = torch.randn(6, 2, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        router(hidden)
    router.eval()
    router(hidden)
    assert router.local_tokens_per_expert.sum() == 0
    router.train()
    _, routing_map = router(hidden)
    assert torch.equal(router.local_tokens_per_expert, routing_map.sum(0))
    router(hidden)
    assert torch.equal(router.local_tokens_per_expert, 2 * routing_map.sum(0))


def test_padding_is_not_counted(router: TrinityRouter) -> None:
    logits = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(2))
    padding = torch.zeros(5, 2, dtype=torch.bool)
    padding[3:, 1] = True
    _, routing_map = router.routing(logits, padding)
    expected = routing_map[~padding.view(-1)].sum(0)
    assert torch.equal(router.local_tokens_per_expert, expected)
    assert expected.sum() == 8 * TOPK


def test_balance_loss_uses_the_biased_selection(build: Callable[..., Any]) -> None:
    coefficient, sequence, batch = 0.1, 12, 3
    model = build(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=coefficient)
    router = model.decoder.layers[1].mlp.router
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        router.expert_bias.copy_(torch.randn(8, generator=generator) * 0.5)
    values = torch.randn(sequence, batch, 8, generator=generator)
    logits = values.clone().requires_grad_()
    probs, routing_map = router.routing(logits)
    # The balance loss enters as a gradient; the routing weights themselves get none here.
    (probs * 0.0).sum().backward()

    exact = values.double().requires_grad_()
    scores = torch.sigmoid(exact)
    shares = scores / scores.sum(-1, keepdim=True)
    biased = scores + router.expert_bias.double()
    selected = torch.zeros_like(scores).scatter(-1, biased.topk(TOPK).indices, 1.0)
    assert torch.equal(selected.view(-1, 8).bool(), routing_map)
    unbiased = torch.zeros_like(scores).scatter(-1, scores.topk(TOPK).indices, 1.0)
    assert not torch.equal(selected, unbiased)
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(batch):  # report eq 29-32, for each sequence, then the mean
        for i in range(8):
            f = 8 / (TOPK * sequence) * selected[:, b, i].sum()
            loss = loss + coefficient * f * shares[:, b, i].mean() / batch
    loss.backward()
    # fp32 against float64; relative to the largest entry.
    scale = exact.grad.abs().max()
    assert scale > 1e-4
    assert (logits.grad.double() - exact.grad).abs().max() < 1e-5 * scale


class SecondOfTwo:
    """A tensor-parallel group as the second of its two ranks sees it."""

    @staticmethod
    def size() -> int:
        return 2

    @staticmethod
    def rank() -> int:
        return 1


def test_a_mask_of_the_whole_sequence_is_cut(router: TrinityRouter) -> None:
    whole = torch.arange(24).view(12, 2) % 5 == 0
    assert torch.equal(router._own_rows(whole, 12), whole)
    router.tp_group = SecondOfTwo()
    # Later pipeline stages get the whole mask for half of the tokens, the first its own part.
    assert torch.equal(router._own_rows(whole, 6), whole[6:])
    assert torch.equal(router._own_rows(whole[6:], 6), whole[6:])


@pytest.mark.parametrize("masked", [False, True])
def test_padding_does_not_change_the_loss_of_the_others(
    masked: bool, build: Callable[..., Any]
) -> None:
    model = build(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.5)
    router = model.decoder.layers[1].mlp.router
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(9, 2, 8, generator=generator)
    padding = torch.zeros(9, 2, dtype=torch.bool)
    if masked:  # the same tokens, the second sequence filled up by two
        logits = torch.cat([logits, torch.randn(2, 2, 8, generator=generator)])
        padding = torch.zeros(11, 2, dtype=torch.bool)
        padding[9:] = True
    logits.requires_grad_()
    probs, _ = router.routing(logits, padding)
    (probs * 0.0).sum().backward()
    assert not logits.grad[9:].any()
    plain = torch.randn(9, 2, 8, generator=torch.Generator().manual_seed(8)).requires_grad_()
    probs, _ = router.routing(plain)
    (probs * 0.0).sum().backward()
    torch.testing.assert_close(logits.grad[:9], plain.grad, rtol=1e-6, atol=0)


def test_statistics_of_the_logits(router: TrinityRouter) -> None:
    logits = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(3))
    padding = torch.zeros(5, 2, dtype=torch.bool)
    padding[4] = True
    logits[4] = 1e6
    statistics = statistics_of(router.config)
    router.routing(logits, padding)
    assert not statistics.take(4, torch.device("cpu"))[..., 0].any()  # not a logging step
    statistics.is_collecting = True
    router.routing(logits, padding)
    router.routing(logits)
    statistics.is_collecting = False
    table = statistics.take(4, torch.device("cpu"))
    seen = torch.cat([logits[:4].flatten(), logits.flatten()]).double()
    row = table[STATISTIC_NAMES.index("router/logit"), router.layer_number]
    assert row.tolist() == pytest.approx([len(seen), seen.sum().item(), 1e6])
    row = table[STATISTIC_NAMES.index("router/logit_square"), router.layer_number]
    assert row[1].item() == pytest.approx(seen.square().sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router_dtype", [None, "fp32", "fp64"])
def test_logits_without_gradients_are_the_same(
    dtype: torch.dtype, router_dtype: str | None, router: TrinityRouter
) -> None:
    router.config.moe_router_dtype = router_dtype  # type: ignore[assignment]
    router.to(dtype)
    tokens = torch.randn(5, 2, router.config.hidden_size).to(dtype)
    with_gradients = router.gating(tokens)
    with torch.no_grad():
        without = router.gating(tokens)
    assert without.dtype == with_gradients.dtype
    assert torch.equal(without, with_gradients)
