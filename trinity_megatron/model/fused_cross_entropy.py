"""Vocabulary-parallel cross entropy by the kernels of :mod:`.logit_kernels`, on a GPU.

8192 tokens of 200,192 bf16 logits are 3.3 GB.  They are read once in the forward pass, read and
overwritten once in the backward pass: 9.8 GB, and a few values per token beside them.
"""

from typing import Any

import torch
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.autograd.function import once_differentiable

from trinity_megatron.model.logit_kernels import reduce_rows, summarize_rows, write_gradient
from trinity_megatron.model.logit_statistics import LogitStatistics, Statistic
from trinity_megatron.model.vocab_parallel import all_reduce, claim_gradient


class FusedCrossEntropy(torch.autograd.Function):
    """Loss, logsumexp and, if requested, maximum and sum of each token's logits, ``[s, b]``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        tp_group: torch.distributed.ProcessGroup | None,
        overwrite_logits: bool,
        collect_statistics: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        first_column = get_pg_rank(tp_group) * logits.size(-1)
        shape, target = target.shape, _flat(target)
        rows = logits.detach().flatten(0, -2)
        reduced = reduce_rows(rows, target, first_column, with_sum=collect_statistics)
        maximum, sums = reduced[0], reduced[1 : 4 if collect_statistics else 3]
        if get_pg_size(tp_group) > 1:
            local_maximum = maximum.clone()
            all_reduce(maximum, torch.distributed.ReduceOp.MAX, tp_group)
            sums[0] *= torch.exp(local_maximum - maximum)
        # Relative to the maximum, so that large logits lose no precision.  NaN: not in this slice,
        # which adds nothing.  A logit that is NaN itself makes the first sum NaN, too.
        inf = float("inf")
        sums[1].sub_(maximum).nan_to_num_(nan=0.0, posinf=inf, neginf=-inf)
        all_reduce(sums, torch.distributed.ReduceOp.SUM, tp_group)
        log_sum = sums[0].log()
        ctx.save_for_backward(logits, target, maximum, sums[0])
        ctx.first_column, ctx.overwrite_logits = first_column, overwrite_logits
        outputs = (log_sum - sums[1]).view(shape), (maximum + log_sum).view(shape)
        if not collect_statistics:
            return *outputs, None, None
        statistics = maximum.view(shape), sums[2].view(shape)
        ctx.mark_non_differentiable(*statistics)
        return *outputs, *statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor, grad_logsumexp: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        grad, logits, target, maximum, denominator = claim_gradient(ctx)
        write_gradient(
            grad.flatten(0, -2),
            logits.detach().flatten(0, -2),
            target,
            ctx.first_column,
            maximum=maximum,
            denominator=denominator,
            grad_loss=_flat(grad_loss),
            grad_logsumexp=_flat(grad_logsumexp),
        )
        # For autograd, which does not see what a Triton kernel writes.
        torch.autograd.graph.increment_version(grad)
        return grad, None, None, None, None

    @staticmethod
    def summarize(
        logsumexp: torch.Tensor,
        maximum: torch.Tensor,
        logit_sum: torch.Tensor,
        loss_mask: torch.Tensor | None,
        vocab_size: int,
    ) -> LogitStatistics:
        """As :func:`.logit_statistics.summarize`, in one launch and with sums of fp64."""
        reduced = summarize_rows(
            _flat(logsumexp),
            _flat(maximum),
            _flat(logit_sum),
            None if loss_mask is None else _flat(loss_mask),
            vocab_size,
        )
        return LogitStatistics(*(Statistic(*row.unbind()) for row in reduced.unbind()))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """``[s, b]`` -> ``[n]``; contiguous, because the gradient of a sum has strides of 0."""
    return tensor.reshape(-1).contiguous()
