"""The sequence-wise balance loss against the report's equations, written as loops."""

import torch

from trinity_megatron.model.moe.balance_loss import sequence_balance_loss

TOPK, EXPERTS, COEFF = 2, 6, 0.3


def draw(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and biased selection of one sequence, fp64 and bool ``[num_tokens, EXPERTS]``."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator, dtype=torch.float64)
    bias = torch.randn(EXPERTS, generator=generator, dtype=torch.float64)
    chosen = (scores + bias).topk(TOPK).indices
    return scores, torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)


def oracle(scores: torch.Tensor, selected: torch.Tensor) -> float:
    """Report eq 29-32, one expert and one token at a time."""
    length, loss = len(scores), 0.0
    for i in range(EXPERTS):
        f = EXPERTS / (TOPK * length) * sum(float(selected[t, i]) for t in range(length))
        p = sum(float(scores[t, i]) / float(scores[t].sum()) for t in range(length)) / length
        loss += COEFF * f * p
    return loss


def summed(scores: torch.Tensor, selected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (scores / scores.sum(-1, keepdim=True)).sum(0), selected.sum(0)


def test_equals_the_loop() -> None:
    sequences = [draw(length, seed) for seed, length in enumerate((5, 17, 64))]
    sums, counts = map(torch.stack, zip(*(summed(*s) for s in sequences), strict=True))
    losses = sequence_balance_loss(sums, counts, topk=TOPK, coeff=COEFF)
    expected = torch.tensor([oracle(*s) for s in sequences], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


def test_balance_costs_the_coefficient() -> None:
    # f = 1 and P = 1/N: the loss is alpha, whatever the length.
    even = torch.full((1, EXPERTS), 12, dtype=torch.int64)
    sums = torch.full((1, EXPERTS), 36 / EXPERTS, dtype=torch.float64)
    assert sequence_balance_loss(sums, even, topk=TOPK, coeff=COEFF).item() == COEFF


def test_parts_of_a_sequence_add_up() -> None:
    scores, selected = draw(40, 9)
    whole, counts = summed(scores, selected)
    parts = [summed(scores[a:b], selected[a:b])[0] for a, b in ((0, 7), (7, 30), (30, 40))]
    options = {"topk": TOPK, "coeff": COEFF}
    losses = [sequence_balance_loss(part[None], counts[None], **options) for part in parts]
    expected = sequence_balance_loss(whole[None], counts[None], **options)
    torch.testing.assert_close(sum(losses), expected, rtol=1e-12, atol=0)


def test_a_sequence_of_padding_costs_nothing() -> None:
    nothing = torch.zeros(1, EXPERTS)
    loss = sequence_balance_loss(nothing, nothing.long(), topk=TOPK, coeff=COEFF)
    assert loss.tolist() == [0.0]
