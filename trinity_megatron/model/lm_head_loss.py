"""Loss of the LM head: cross entropy over a split vocabulary, z-loss, statistics of the logits.

The logits are the largest tensor of a training step.  Here they are walked over in chunks of tokens
that stay in the cache: no second tensor of their size is made, the gradient is written into their
storage, and what z-loss and statistics need comes out of the same walk.  Megatron passes over the
logits in memory some ten times, and for bf16 logits holds an fp32 copy of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.autograd.function import once_differentiable

from trinity_megatron.errors import UserError
from trinity_megatron.telemetry.step_statistics import STATISTICS

# Bytes of a chunk in the dtype of the computation.  CPU: 1 to 4 MB are equally fast on 32 MB of L3,
# and fewer chunks mean fewer times that the threads wait for each other.  Elsewhere large enough to
# hide the launch of a kernel; not measured.
_CHUNK_BYTES = {"cpu": 4 << 20}
_CHUNK_BYTES_OF_ACCELERATORS = 64 << 20


@dataclass(frozen=True)
class Statistic:
    """How many values (int64), their sum and their maximum (-inf without values); scalars."""

    count: torch.Tensor
    total: torch.Tensor
    maximum: torch.Tensor


class LogitStatistics(NamedTuple):
    """Statistics over the tokens whose loss counts; on the device, nothing is read back.

    Over the whole vocabulary, padding included, and so the same on every tensor-parallel rank.

    Attributes:
        logit: Of each logit.
        logsumexp: Of each token's logsumexp.
        logsumexp_square: Of its square; the z-loss is the coefficient times the mean.
    """

    logit: Statistic
    logsumexp: Statistic
    logsumexp_square: Statistic


class CrossEntropy(NamedTuple):
    """What :func:`vocab_parallel_cross_entropy` returns.

    Attributes:
        loss: Cross entropy in nats, ``[s, b]``.
        logsumexp: Log of the softmax's denominator, ``[s, b]``.
        statistics: None unless asked for.
    """

    loss: torch.Tensor
    logsumexp: torch.Tensor
    statistics: LogitStatistics | None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    tp_group: torch.distributed.ProcessGroup | None = None,
    overwrite_logits: bool = False,
    collect_statistics: bool = False,
    loss_mask: torch.Tensor | None = None,
) -> CrossEntropy:
    r"""Cross entropy and logsumexp of each token, both differentiable.

    :math:`\mathrm{lse} = \log\sum_i e^{x_i}`, :math:`\mathrm{loss} = \mathrm{lse} - x_{target}`;
    with the softmax p, :math:`\partial x = p (g_{loss} + g_{lse}) - g_{loss} \, onehot`.

    Two all-reduces of a few numbers for each token in the forward pass, none in the backward pass;
    none at all on one rank.

    Args:
        logits: This rank's slice of the vocabulary, ``[s, b, v / tp]``, the same size on each rank;
            copied if not contiguous.  A slice without any finite logit gives NaN.
        target: Index in the whole vocabulary, int64 ``[s, b]``.  One outside of it is taken for a
            logit that equals the largest and gets no gradient, as in Megatron: mask its loss.
        tp_group: Ranks that hold the other slices; None for one rank.
        overwrite_logits: The caller does not need the values of ``logits`` after the backward pass,
            which then leaves the gradient in their storage.  Never done to a leaf's storage, whose
            values are somebody's.  Another part of the graph that saved these logits, or a second
            backward pass, raises a RuntimeError.
        collect_statistics: Return statistics; one more pass over each chunk.
        loss_mask: Tokens whose loss counts (not 0 or False), ``[s, b]``; only for the statistics.

    Returns:
        Loss and logsumexp in fp32 (fp64 for fp64 logits), and the statistics.

    Raises:
        UserError: A shape does not fit.
    """
    for name, tensor in (("target", target), ("loss_mask", loss_mask)):
        if tensor is not None and tensor.shape != logits.shape[:-1]:
            raise UserError(
                f"{name} of shape {list(tensor.shape)} does not fit logits of shape "
                f"{list(logits.shape)}. Remedy: one value for each token, "
                f"{list(logits.shape[:-1])} ([s, b], not [b, s])."
            )
    logits = logits.contiguous()
    overwrite_logits = overwrite_logits and not _is_storage_of_leaf(logits)
    loss, logsumexp, maximum, logit_sum = _VocabParallelCrossEntropy.apply(
        logits, target, tp_group, overwrite_logits, collect_statistics
    )
    statistics = None
    if collect_statistics:
        vocab_size = logits.size(-1) * get_pg_size(tp_group)
        statistics = _summarize(logsumexp.detach(), maximum, logit_sum, loss_mask, vocab_size)
    return CrossEntropy(loss, logsumexp, statistics)


def z_loss(logsumexp: torch.Tensor, coeff: float) -> torch.Tensor:
    """``coeff * logsumexp^2`` of each token; the mean over the unmasked tokens is the z-loss.

    Keeps the softmax's denominator near 1, which cross entropy alone does not determine.

    Args:
        logsumexp: Any shape.
        coeff: Weight of the z-loss, 1e-6 in Trinity Large.

    Source: report section 3.3 and section 6 item 3, which name it; the form is that of the kernel
    they used, ``lse_square_scale`` in ops/cross_entropy.py of github.com/linkedin/Liger-Kernel.
    """
    return coeff * logsumexp.square()


def add_z_loss(loss: torch.Tensor, logsumexp: torch.Tensor, coeff: float) -> torch.Tensor:
    """``loss`` in value, ``loss + z_loss`` in gradient: what is logged stays the cross entropy.

    Mask and normalisation reach the z-loss with the gradient of the result.

    Args:
        loss: Cross entropy of each token.
        logsumexp: As ``loss``.
        coeff: Weight of the z-loss.
    """
    z = z_loss(logsumexp, coeff)
    return loss + (z - z.detach())


class LanguageModelLoss:
    """Takes the place of ``compute_language_model_loss`` of a Megatron ``LanguageModule``.

    In place of each of Megatron's implementations: ``cross_entropy_loss_fusion`` makes no
    difference, because z-loss and statistics need what those do not return.  Adds the z-loss in
    training where ``config.lm_head_z_loss_coeff``, read at each call, is not zero.  Statistics go
    to ``STATISTICS`` in training steps that are logged.

    Args:
        model: Pipeline chunk with an output layer, whose logits nobody else keeps.

    Attributes:
        loss_mask: Mask of the next micro-batch for the statistics, ``[b, s]``; None for all tokens.
            :meth:`take_loss_mask` sets it, and the next call forgets it.
    """

    def __init__(self, model: LanguageModule) -> None:
        self.model = model
        self.loss_mask: torch.Tensor | None = None

    def take_loss_mask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: ``compute_language_model_loss`` is not handed the mask."""
        self.loss_mask = kwargs.get("loss_mask")

    def __call__(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each token in nats, fp32 ``[b, s]``.

        Args:
            labels: int64 ``[b, s]``.
            logits: ``[s, b, v / tp]``; the backward pass leaves their gradient there.
        """
        loss_mask, self.loss_mask = self.loss_mask, None
        is_training = self.model.training and torch.is_grad_enabled()
        loss, logsumexp, statistics = vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1),
            tp_group=self.model.tp_group,
            overwrite_logits=True,
            collect_statistics=is_training and STATISTICS.is_collecting,
            loss_mask=None if loss_mask is None else loss_mask.transpose(0, 1),
        )
        if statistics is not None:
            for name, values in statistics._asdict().items():
                STATISTICS.observe(f"lm_head/{name}", **vars(values))
        coeff = self.model.config.lm_head_z_loss_coeff
        if coeff and is_training:
            loss = add_z_loss(loss, logsumexp, coeff)
        return loss.transpose(0, 1).contiguous()


def attach_language_model_loss(model: list[LanguageModule]) -> list[LanguageModule]:
    """Give the chunks that have an output layer our loss.  A pre-wrap hook of Megatron's builders.

    Args:
        model: Unwrapped pipeline chunks of this rank, changed in place.

    Returns:
        ``model``.
    """
    for chunk in model:
        if chunk.post_process:
            loss = LanguageModelLoss(chunk)
            chunk.compute_language_model_loss = loss  # type: ignore[method-assign]
            chunk.register_forward_pre_hook(loss.take_loss_mask, with_kwargs=True)
    return model


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Loss, logsumexp and, if asked for, maximum and sum of each token's logits, all ``[s, b]``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        tp_group: torch.distributed.ProcessGroup | None,
        overwrite_logits: bool,
        collect_statistics: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        rows = logits.detach().flatten(0, -2)
        first_column = get_pg_rank(tp_group) * logits.size(-1)
        column, is_here = _locate(target, first_column, logits.size(-1))
        maximum, peak, norm, logit_sum = _reduce_rows(rows, with_sum=collect_statistics)
        local_maximum = maximum.clone()
        _all_reduce(maximum, torch.distributed.ReduceOp.MAX, tp_group)
        # Relative to the maximum: exact where the logits themselves are large.
        predicted = rows.gather(1, column).squeeze(1) - maximum
        rescale = torch.exp(local_maximum - maximum)
        sums = torch.stack(
            [
                norm / peak * rescale,
                predicted.masked_fill_(~is_here, 0.0),
                *([logit_sum] if logit_sum is not None else []),
            ]
        )
        _all_reduce(sums, torch.distributed.ReduceOp.SUM, tp_group)
        log_sum = sums[0].log()
        shape = target.shape
        ctx.save_for_backward(logits, target, rescale / (peak * sums[0]))
        ctx.first_column, ctx.overwrite_logits = first_column, overwrite_logits
        ctx.is_overwritten = False
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
        if ctx.is_overwritten:
            raise RuntimeError(
                "A second backward pass through vocab_parallel_cross_entropy: the first one left "
                "the gradient in the storage of the logits. Remedy: add the losses and call "
                "backward once, or overwrite_logits=False."
            )
        logits, target, scale = ctx.saved_tensors
        ctx.is_overwritten = ctx.overwrite_logits
        # detach() shares the version counter: who else saved these logits will notice.
        grad = logits.detach() if ctx.overwrite_logits else torch.empty_like(logits)
        column, is_here = _locate(target, ctx.first_column, logits.size(-1))
        grad_loss = grad_loss.reshape(-1, 1).to(scale.dtype)
        grad_logsumexp = grad_logsumexp.reshape(-1, 1).to(scale.dtype)
        _write_gradient(
            grad.flatten(0, -2),
            logits.detach().flatten(0, -2),
            factor=(grad_loss + grad_logsumexp) * scale.unsqueeze(1),
            column=column,
            at_target=grad_loss.neg().masked_fill_(~is_here.unsqueeze(1), 0.0),
        )
        return grad, None, None, None, None


def _reduce_rows(
    rows: torch.Tensor, *, with_sum: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Reduce each row ``[v]`` of ``[n, v]`` to numbers, in one walk.

    torch's softmax is twice as fast as exp and sum, but adds up a row one after the other in fp32:
    with 200,000 columns its denominator D is wrong by up to 1e-5.  The sum of its output, which
    torch adds pairwise, is the exact denominator over D; the largest output is 1 / D.

    Returns:
        Maximum, 1 / D, exact denominator over D, and the sum of the row or None, each ``[n]``.
    """
    dtype = _compute_dtype(rows)
    maximum, peak, norm, row_sum = torch.empty(4, len(rows), dtype=dtype, device=rows.device)
    for part, chunk, scratch in _chunks(rows):
        maximum[part] = chunk.amax(dim=1)
        if with_sum:
            row_sum[part] = chunk.sum(dim=1, dtype=dtype)
        torch.softmax(chunk, dim=1, dtype=dtype, out=scratch)
        torch.amax(scratch, dim=1, out=peak[part])
        torch.sum(scratch, dim=1, out=norm[part])
    return maximum, peak, norm, row_sum if with_sum else None


def _write_gradient(
    grad: torch.Tensor,
    rows: torch.Tensor,
    *,
    factor: torch.Tensor,
    column: torch.Tensor,
    at_target: torch.Tensor,
) -> None:
    """``softmax(rows) * factor``, plus ``at_target`` in ``column``; rounded once.

    Args:
        grad: Written, ``[n, v]``; may be ``rows``.
        rows: ``[n, v]``.
        factor: ``[n, 1]``.
        column: int64 ``[n, 1]``.
        at_target: ``[n, 1]``.
    """
    for part, chunk, scratch in _chunks(rows):
        torch.softmax(chunk, dim=1, dtype=scratch.dtype, out=scratch)
        result = grad[part] if grad.dtype == scratch.dtype else scratch
        torch.mul(scratch, factor[part], out=result)
        result.scatter_add_(1, column[part], at_target[part])
        if result is scratch:
            grad[part] = scratch


def _chunks(rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Cut ``[n, v]`` into parts of the size of the cache.

    Yields:
        Where the part is, the part, and memory of its shape in the dtype of the computation.
    """
    dtype = _compute_dtype(rows)
    # The threads of a CPU share a softmax by its rows: the same number for each.
    threads = torch.get_num_threads() if rows.device.type == "cpu" else 1
    size = _CHUNK_BYTES.get(rows.device.type, _CHUNK_BYTES_OF_ACCELERATORS)
    num_rows = size // (rows.size(1) * dtype.itemsize) // threads * threads
    num_rows = max(1, min(len(rows), max(threads, num_rows)))
    scratch = torch.empty(num_rows, rows.size(1), dtype=dtype, device=rows.device)
    for start in range(0, len(rows), num_rows):
        part = slice(start, start + num_rows)
        chunk = rows[part]
        yield part, chunk, scratch[: len(chunk)]


def _locate(
    target: torch.Tensor, first_column: int, num_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in this slice, ``[n, 1]``, and whether it is there at all, ``[n]``."""
    column = target.reshape(-1) - first_column
    is_here = (column >= 0) & (column < num_columns)
    return column.clamp_(0, num_columns - 1).unsqueeze(1), is_here


def _all_reduce(
    tensor: torch.Tensor, op: Any, group: torch.distributed.ProcessGroup | None
) -> None:
    if get_pg_size(group) > 1:
        torch.distributed.all_reduce(tensor, op=op, group=group)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _is_storage_of_leaf(tensor: torch.Tensor) -> bool:
    owner = tensor if tensor._base is None else tensor._base
    return owner.is_leaf


def _summarize(
    logsumexp: torch.Tensor,
    maximum: torch.Tensor,
    logit_sum: torch.Tensor,
    loss_mask: torch.Tensor | None,
    vocab_size: int,
) -> LogitStatistics:
    """Reduce per-token numbers, each ``[s, b]``, over the tokens whose loss counts."""
    counts = torch.ones_like(logsumexp, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    num_tokens = counts.sum()

    def reduce(totals: torch.Tensor, maxima: torch.Tensor, per_token: int = 1) -> Statistic:
        # where, not a product: a masked token may be inf or NaN.
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
