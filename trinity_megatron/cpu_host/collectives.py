"""Uneven collectives of a CPU host, which the gloo backend lacks."""

import functools
from typing import Any

import torch


def stand_in_for_collectives() -> None:
    """Add uneven all-gather and reduce-scatter to gloo.

    Tensor parallelism within experts (``--expert-tensor-parallel-size`` > 1) needs both.
    """
    distributed = torch.distributed
    even_all_gather, even_reduce_scatter = distributed.all_gather, distributed.reduce_scatter

    @functools.wraps(even_all_gather)
    def all_gather(outputs: list, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        sizes = [output.shape[0] if output.dim() else 1 for output in outputs]
        if len(set(sizes)) <= 1:
            return even_all_gather(outputs, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        work = even_all_gather(parts, padded, group=group)
        for output, part in zip(outputs, parts, strict=True):
            output.copy_(part[: output.shape[0]])
        return work

    @functools.wraps(even_reduce_scatter)
    def reduce_scatter(
        output: Any, inputs: list, op: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        total = torch.cat([tensor.contiguous() for tensor in inputs])
        work = distributed.all_reduce(total, op=op or distributed.ReduceOp.SUM, group=group)
        rank = distributed.get_rank(group)
        start = sum(tensor.shape[0] for tensor in inputs[:rank])
        output.copy_(total[start : start + inputs[rank].shape[0]])
        return work

    distributed.all_gather = all_gather  # type: ignore[assignment]
    distributed.reduce_scatter = reduce_scatter  # type: ignore[assignment]
