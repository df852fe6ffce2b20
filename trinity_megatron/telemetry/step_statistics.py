"""What the modules of a model observe in a logging step, kept on the device.

A router, an attention or the loss calls :meth:`StepStatistics.observe` where the numbers pass by
anyway.  Nothing is reduced, copied to the host or even computed outside of logging steps: callers
ask :attr:`StepStatistics.is_collecting` first.
"""

from typing import Any

import torch

from trinity_megatron.telemetry.step_loss import StepLoss

# name -> what its count, total and maximum are of.  The order is that of the exchanged tensor.
STATISTIC_NAMES = (
    "router/logit",  # router logits
    "router/logit_square",
    "attention/logit_bound",  # maximum only: an upper bound of the attention logits
    "lm_head/logit",
    "lm_head/logsumexp",
    "lm_head/logsumexp_square",
)

# Parts of the model whose gradient norms are logged; optimizer/param_groups.py says what is whose.
GRADIENT_GROUPS = (
    "embedding",
    "attention",
    "dense_mlp",
    "shared_experts",
    "experts",
    "router",
    "norms",
    "lm_head",
)


class StepStatistics:
    """Counts, sums and maxima of one step on this rank, by name and layer, and micro-batch losses.

    Attributes:
        is_collecting: Whether this step is logged.
        step_loss: Sums the losses of every step, where they are needed before its update.
    """

    def __init__(self) -> None:
        self.is_collecting = False
        self.step_loss: StepLoss | None = None
        self._values: dict[tuple[str, int], torch.Tensor] = {}
        self._micro_batches: list[torch.Tensor] = []

    def clear(self) -> None:
        """Forget everything, before a step begins."""
        self._values.clear()
        self._micro_batches.clear()

    def observe(
        self,
        name: str,
        *,
        layer: int = 0,
        count: torch.Tensor | float,
        total: torch.Tensor | float,
        maximum: torch.Tensor,
    ) -> None:
        """Add values that were seen; call it several times a step, one for each micro-batch.

        Args:
            name: One of :data:`STATISTIC_NAMES`.
            layer: 1-based number of the layer; 0 for what belongs to no layer.
            count: How many values.
            total: Their sum.
            maximum: Their maximum, a tensor on the device of the model.
        """
        assert name in STATISTIC_NAMES, name
        device = maximum.device
        # full(): a number that is copied to a GPU would make the host wait for it.
        seen = [
            value.double()
            if isinstance(value, torch.Tensor)
            else torch.full((), value, dtype=torch.float64, device=device)
            for value in (count, total)
        ]
        new = torch.stack([*seen, maximum.detach().double()])
        old = self._values.get((name, layer))
        if old is not None:
            new = torch.cat([old[:2] + new[:2], torch.maximum(old[2:], new[2:])])
        self._values[name, layer] = new

    def observe_micro_batch(self, loss_sum: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Remember the summed loss and the number of tokens of a micro-batch (both scalars)."""
        self._micro_batches.append(torch.stack([loss_sum.detach().double(), num_tokens.double()]))

    def take(self, num_layers: int, device: torch.device) -> torch.Tensor:
        """The step's statistics; they are forgotten here.

        Returns:
            Count, total and maximum, fp64 ``[len(STATISTIC_NAMES), num_layers + 1, 3]``; nothing
            seen is 0, 0, -inf.
        """
        # full(): see observe().
        zero, least = (
            torch.full((count,), value, dtype=torch.float64, device=device)
            for count, value in ((2, 0.0), (1, float("-inf")))
        )
        nothing = torch.cat([zero, least])
        rows = [
            self._values.get((name, layer), nothing)
            for name in STATISTIC_NAMES
            for layer in range(num_layers + 1)
        ]
        self._values.clear()
        return torch.stack(rows).view(len(STATISTIC_NAMES), num_layers + 1, 3)

    def take_micro_batches(self, num_micro_batches: int, device: torch.device) -> torch.Tensor:
        """Loss sum and tokens of each micro-batch, fp64 ``[num_micro_batches, 2]``.

        Zero where this rank computed no loss; forgotten here.
        """
        losses = torch.zeros(num_micro_batches, 2, dtype=torch.float64, device=device)
        if self._micro_batches:
            seen = torch.stack(self._micro_batches)[-num_micro_batches:]
            losses[: len(seen)] = seen
        self._micro_batches.clear()
        return losses


def statistics_of(config: Any) -> StepStatistics:
    """The collector of a model, which its modules reach through their config.

    Args:
        config: Of the model, shared by its modules.
    """
    return config.__dict__.setdefault("step_statistics", StepStatistics())
