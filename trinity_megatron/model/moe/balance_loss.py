"""The sequence-wise balance loss as pure functions of scores and counts."""

import torch


def sequence_balance_loss(
    score_sums: torch.Tensor, tokens_per_expert: torch.Tensor, *, topk: int, coeff: float
) -> torch.Tensor:
    r"""Balance loss of each sequence.

    .. math::
        f_i = \frac{N}{K T} \sum_t 1[i \in \mathrm{TopK}(s_t + b)], \qquad
        P_i = \frac{1}{T} \sum_t \frac{s_{i,t}}{\sum_j s_{j,t}}, \qquad
        L = \alpha \sum_i f_i P_i

    It is linear in ``score_sums``: where the tokens of a sequence lie on several ranks, each rank
    gives its own score sums with the counts of all, and the sum over the ranks is the loss.

    Args:
        score_sums: Sum over tokens of the normalised scores, floating ``[num_sequences,
            num_experts]``.
        tokens_per_expert: Tokens of the whole sequence that selected each expert, bias included,
            int64 ``[num_sequences, num_experts]``.  T is their sum over K.
        topk: K.
        coeff: alpha.

    Returns:
        ``[num_sequences]``; 0 for a sequence without tokens.

    Source: report eq 29-32.
    """
    num_experts = tokens_per_expert.shape[-1]
    num_tokens = (tokens_per_expert.sum(dim=-1) / topk).to(score_sums.dtype).clamp_min(1.0)
    weights = tokens_per_expert.to(score_sums.dtype)
    dot = (weights * score_sums).sum(dim=-1)
    return coeff * num_experts / topk * dot / num_tokens.square()


def normalized_scores(scores: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """``s_i / sum_j s_j`` of each token, 0 for padding.

    Args:
        scores: fp32 ``[num_tokens, num_experts]``.
        padding_mask: Bool ``[num_tokens]``, True for padding; None where there is none.

    Returns:
        fp32 ``[num_tokens, num_experts]``.
    """
    scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return scores if padding_mask is None else scores * ~padding_mask[:, None]


def mean_balance_loss(
    scores: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    padding_mask: torch.Tensor | None,
    *,
    topk: int,
    coeff: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of :func:`sequence_balance_loss` over the sequences, each weighed by its tokens.

    Megatron's own weighs micro-batches; with padding that depends on how they are cut.

    Args:
        scores: Of the tokens of this rank, ``[num_tokens, num_experts]``, sequences alternating.
        tokens_per_expert: See :func:`sequence_balance_loss`.
        padding_mask: See :func:`normalized_scores`.
        topk: K.
        coeff: alpha.

    Returns:
        The loss and the number of tokens, at least 1; scalars.
    """
    scores = normalized_scores(scores, padding_mask)
    sums = scores.view(-1, *tokens_per_expert.shape).sum(dim=0)
    losses = sequence_balance_loss(sums, tokens_per_expert, topk=topk, coeff=coeff)
    num_tokens = tokens_per_expert.sum(dim=-1) / topk
    total = num_tokens.sum().clamp_min(1.0)
    return (losses * num_tokens).sum() / total, total
