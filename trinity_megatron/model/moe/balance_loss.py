"""The sequence-wise balance loss as a pure function of counts and score sums."""

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
