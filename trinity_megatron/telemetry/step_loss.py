"""The loss of a step on all ranks, known on the host before the optimizer steps."""

from __future__ import annotations

import torch
from torch import Tensor


class StepLoss:
    """Sum of the token losses of a step and number of tokens, over all micro-batches and ranks.

    Ranks that compute no loss (pipeline stages before the last one) add nothing; those that compute
    the same one (tensor parallelism) add as many tokens as they add losses.  On a GPU the host does
    not wait for the exchange: it is read after the gradient norm, which is waited for anyway.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._on_host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def clear(self) -> None:
        """Forget everything, before a step begins."""
        self._sums = None

    def add(self, loss_sum: Tensor, num_tokens: Tensor) -> None:
        """Add a micro-batch: its summed loss and number of tokens (both scalars)."""
        new = torch.stack([loss_sum.detach().double(), num_tokens.double()])
        self._sums = new if self._sums is None else self._sums + new

    def exchange(self, device: torch.device) -> None:
        """Begin the sum over all ranks; every rank calls it, after its last micro-batch.

        Args:
            device: Of the model.
        """
        sums = self._sums
        if sums is None:
            sums = torch.zeros(2, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        if not sums.is_cuda:
            self._on_host = sums
            return
        if self._on_host is None:
            self._on_host = torch.empty(2, dtype=torch.float64, pin_memory=True)
            self._copied = torch.cuda.Event()
        self._on_host.copy_(sums, non_blocking=True)
        assert self._copied is not None
        self._copied.record()

    def read(self) -> float | None:
        """The mean loss of a token; None where no token of the step has a loss."""
        if self._copied is not None:
            self._copied.synchronize()
        assert self._on_host is not None
        total, count = self._on_host.tolist()
        return total / count if count else None
