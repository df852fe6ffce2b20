"""The loss of a model against that of another one with nearly the same weights."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LossDifference:
    """What a change of the weights costs.

    Attributes:
        reference: Mean loss of the reference, in nats a token.
        other: Mean loss of the other model.
        largest: Largest difference of the loss of one token.
        num_tokens: Number of tokens that were predicted.
    """

    reference: float
    other: float
    largest: float
    num_tokens: int

    @property
    def difference(self) -> float:
        """Nats a token that the other model is worse; negative if it is better."""
        return self.other - self.reference

    def __str__(self) -> str:
        return (
            f"loss {self.other:.6f} against {self.reference:.6f} nats a token: "
            f"{self.difference:+.6f} over {self.num_tokens} tokens (one token at most "
            f"{self.largest:.3g})"
        )


def compare_losses(reference: torch.Tensor, other: torch.Tensor) -> LossDifference:
    """Compare the losses of the same tokens.

    Args:
        reference: fp32 ``[b, s - 1]``, of the reference.
        other: The same of the other model.
    """
    return LossDifference(
        reference.double().mean().item(),
        other.double().mean().item(),
        (reference - other).abs().max().item(),
        reference.numel(),
    )


@torch.no_grad()
def token_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every next token, one sequence at a time.

    Args:
        model: transformers' ``AfmoeForCausalLM``.
        tokens: int64 ``[b, s]`` with ``s >= 2``.

    Returns:
        fp32 ``[b, s - 1]``, on the CPU.
    """
    losses = []
    for row in tokens.to(model.device):
        logits = model(row[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").cpu())
    return torch.stack(losses)
