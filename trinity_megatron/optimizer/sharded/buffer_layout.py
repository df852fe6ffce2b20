"""Megatron's gradient buffers, laid out so that a shard of experts is whole matrices.

Megatron cuts every bucket of a buffer into one equal shard for each data-parallel rank, wherever
the cut falls.  All matrices of the routed experts have one size, so shards that are a multiple of
it cut none of them, and nothing has to travel to be orthogonalized.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from megatron.core.optimizer.param_layout import PerBufferParamLayout
from torch import Tensor
from torch.nn import Module

from trinity_megatron.optimizer.param_groups import find_row
from trinity_megatron.optimizer.sharded.ownership import Shard
from trinity_megatron.upstream.registry import replaced

# Padding at the end of a bucket, of its size, below which a bucket may end, and that of a whole
# buffer above which the matrices are not worth it.
_BUCKET_PADDING, _BUFFER_PADDING = 0.02, 0.1


def separate_muon_buffers(model: list[Module]) -> list[Module]:
    """Give Muon's parameters buffers of their own: a Megatron ``pre_wrap_hook``.

    The attribute is Megatron's for the layer-wise optimizer, and its only way to divide a buffer;
    a `DistributedOptimizer` must own all of its buffers.

    Raises:
        ValueError: A parameter is in no row of PARAM_TABLE.
    """
    for chunk in model:
        tag_for_buffers(chunk.named_parameters(), chunk.config)
    return model


def tag_for_buffers(named_parameters: Iterable[tuple[str, Tensor]], config: Any) -> None:
    """Set what decides on the buffer of a parameter and its layout there.

    Args:
        named_parameters: Names and parameters of a part of the model.
        config: Megatron's ``TransformerConfig``.

    Raises:
        ValueError: A parameter is in no row of PARAM_TABLE.
    """
    for name, param in named_parameters:
        if not param.requires_grad:
            continue
        row = find_row(name)
        param.is_managed_by_layer_wise_optimizer = row.optimizer == "muon"  # type: ignore[attr-defined]
        if row.group == "experts":
            split = row.split == "gate_up" and config.gated_linear_unit
            matrices = (param.shape[0] if param.dim() == 3 else 1) * (2 if split else 1)
            param.muon_matrix_numel = param.numel() // matrices  # type: ignore[attr-defined]


def aligned_expert_buffers() -> AbstractContextManager[None]:
    """Let Megatron lay out buffers of experts by `matrix_aligned_layout` in the block."""
    return replaced(
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer._compute_per_buffer_param_layout",
        _aligned_where_whole,
    )


def matrix_aligned_layout(
    params: Sequence[Tensor], matrix_numel: int, bucket_size: int | None, ranks: int
) -> PerBufferParamLayout | None:
    """Lay out stacks of matrices of one size so that no shard cuts a matrix.

    A bucket ends at a parameter, once it is large enough and its matrices divide over the ranks
    with almost no rest.

    Args:
        params: In the order of the model; Megatron lays them out from the last to the first.
        matrix_numel: Elements of each matrix.
        bucket_size: Elements a bucket should have; None: one bucket.
        ranks: Data-parallel ranks.

    Returns:
        The layout, or None where the padding would exceed a tenth of the buffer.
    """
    index_map: dict[Tensor, tuple[int, int, int]] = {}
    buckets: list[tuple[int, int]] = []
    unpadded: list[int] = []
    start = position = 0
    for number, param in enumerate(reversed(params), start=1):
        index_map[param] = (position, position + param.numel(), len(buckets))
        position += param.numel()
        matrices = (position - start) // matrix_numel
        end = start + -(-matrices // ranks) * ranks * matrix_numel
        large = bucket_size is not None and position - start >= bucket_size
        if number == len(params) or (large and end - position <= _BUCKET_PADDING * (end - start)):
            buckets.append((start, end))
            unpadded.append(position - start)
            start = position = end
    if position - sum(unpadded) > _BUFFER_PADDING * position:
        return None
    return PerBufferParamLayout(
        param_index_map=index_map,
        bucket_indices=buckets,
        per_bucket_numel_unpadded=unpadded,
        num_optimizer_shards=ranks,
    )


def shard_bounds(
    start: int, numel: int, bucket: tuple[int, int], tables: list[list[int]]
) -> list[tuple[Shard, ...]]:
    """Who holds which elements of a parameter.

    Args:
        start: First element of the parameter in the buffer.
        numel: Its elements.
        bucket: First and last element of its bucket.
        tables: For each tensor-parallel rank, the ranks of its data-parallel shards.

    Returns:
        For each tensor-parallel rank, its shards, in order.
    """
    ranks = len(tables[0])
    size = (bucket[1] - bucket[0]) // ranks
    offset = start - bucket[0]
    numbers = range(offset // size, -(-(offset + numel) // size))
    return [
        tuple(
            Shard(table[n], max(n * size - offset, 0), min((n + 1) * size - offset, numel))
            for n in numbers
        )
        for table in tables
    ]


def _aligned_where_whole(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def layout(
        params: list[Any],
        bucket_size: int | None,
        data_parallel_world_size: int,
        ddp_config: Any,
        param_indices: list[int] | None = None,
    ) -> PerBufferParamLayout:
        sizes = {getattr(param, "muon_matrix_numel", None) for param in params}
        size = sizes.pop() if len(sizes) == 1 else None
        # Megatron wants every parameter and shard to start at a multiple of 64 elements, and NCCL
        # is fastest on large powers of two.
        if size and size % 64 == 0 and not ddp_config.pad_buckets_for_high_nccl_busbw:
            aligned = matrix_aligned_layout(params, size, bucket_size, data_parallel_world_size)
            if aligned is not None:
                aligned.param_indices = param_indices or []
                return aligned
        return original(params, bucket_size, data_parallel_world_size, ddp_config, param_indices)

    return layout
