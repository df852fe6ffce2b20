"""What the implementations of the vocabulary-parallel cross entropy share."""

from typing import Any

import torch
from megatron.core.utils import get_pg_size


def all_reduce(tensor: torch.Tensor, op: Any, group: torch.distributed.ProcessGroup | None) -> None:
    """Reduce in place over the ranks of the group; nothing for one rank."""
    if get_pg_size(group) > 1:
        torch.distributed.all_reduce(tensor, op=op, group=group)


def claim_gradient(ctx: Any) -> tuple[torch.Tensor, ...]:
    """What a backward pass writes the gradient of the logits into, and the saved tensors.

    Args:
        ctx: Of the autograd function, which saved the logits first.  ``ctx.overwrite_logits`` says
            whether the gradient takes their storage, which can be done once.

    Raises:
        RuntimeError: The storage holds a gradient already, or another operation needs the values.
    """
    if getattr(ctx, "is_overwritten", False):
        raise RuntimeError(
            "A second backward pass through vocab_parallel_cross_entropy: the first one left "
            "the gradient in the storage of the logits. Remedy: add the losses and call "
            "backward once, or overwrite_logits=False."
        )
    logits, *saved = ctx.saved_tensors
    ctx.is_overwritten = ctx.overwrite_logits
    # detach() shares the version counter, so autograd detects other operations that saved them.
    grad = logits.detach() if ctx.overwrite_logits else torch.empty_like(logits)
    return grad, logits, *saved
