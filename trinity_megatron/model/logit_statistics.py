"""Statistics of the logits: count, sum and maximum over the unmasked tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Statistic:
    """Scalar tensors: number of values, their sum, their maximum (-inf without values).

    The number is of int64; all three are of fp64 where a kernel computed them.
    """

    count: torch.Tensor
    total: torch.Tensor
    maximum: torch.Tensor


class LogitStatistics(NamedTuple):
    """Statistics over the unmasked tokens, without a synchronization with the host.

    They cover the whole vocabulary, padding included, and are the same on every TP rank.

    Attributes:
        logit: Statistic of the logits.
        logsumexp: Statistic of the logsumexp of each token.
        logsumexp_square: Statistic of its square.  The z-loss is the coefficient times the mean.
    """

    logit: Statistic
    logsumexp: Statistic
    logsumexp_square: Statistic


def summarize(
    logsumexp: torch.Tensor,
    maximum: torch.Tensor,
    logit_sum: torch.Tensor,
    loss_mask: torch.Tensor | None,
    vocab_size: int,
) -> LogitStatistics:
    """Reduce values of each token, all ``[s, b]``, over the unmasked tokens.

    Args:
        logsumexp: Logsumexp of the logits.
        maximum: Largest logit.
        logit_sum: Sum of the logits.
        loss_mask: Nonzero or True for the tokens to include; None for all.
        vocab_size: Number of logits of a token, padding included.
    """
    counts = torch.ones_like(logsumexp, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    num_tokens = counts.sum()

    def reduce(totals: torch.Tensor, maxima: torch.Tensor, per_token: int = 1) -> Statistic:
        # torch.where, because the values of a masked token may be inf or NaN.
        return Statistic(
            num_tokens * per_token,
            torch.where(counts, totals, 0.0).sum(),
            torch.where(counts, maxima, float("-inf")).max(),
        )

    square = logsumexp.square()
    return LogitStatistics(
        logit=reduce(logit_sum, maximum, vocab_size),
        logsumexp=reduce(logsumexp, logsumexp),
        logsumexp_square=reduce(square, square),
    )
