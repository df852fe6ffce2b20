"""Norms of tensors on a CPU, accurate to fp32 however a tensor is split.

torch.norm adds up a large fp32 tensor in one running sum on a CPU, whose fifth digit is wrong and
depends on how the tensor is split over ranks.  These functions sum short rows, then add in fp64.
"""

from collections.abc import Iterable
from typing import Any

import torch

_ROW_LENGTH = 1024


def norms_of_rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    """L2 norms of short rows of a flattened tensor, for which one running fp32 sum is accurate.

    Args:
        tensor: Floating point, any shape.

    Returns:
        fp32 norms of the full rows ``[n]`` and of the remainder ``[1]``.
    """
    flat = tensor.reshape(-1)
    whole = flat.numel() // _ROW_LENGTH * _ROW_LENGTH
    rows = [flat[:whole].view(-1, _ROW_LENGTH), flat[whole:].view(1, -1)]
    return [torch.linalg.vector_norm(row, dim=-1, dtype=torch.float32) for row in rows]


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of all elements.

    Args:
        tensor: Floating point, any shape.

    Returns:
        fp64 scalar.
    """
    return torch.cat(norms_of_rows(tensor)).double().square().sum()


def largest_magnitudes(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Largest absolute value of each tensor; NaN where one is in it.

    A quarter of the time of ``torch._foreach_norm(..., inf)`` on a CPU.

    Args:
        tensors: Floating point, any shape with an element.

    Returns:
        Scalars in the dtypes of the tensors.
    """
    return [torch.stack(torch.aminmax(tensor)).abs().max() for tensor in tensors]


def multi_tensor_l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list, per_tensor: bool, *args: Any
) -> tuple[torch.Tensor, None]:
    """Replaces ``multi_tensor_l2norm`` of Transformer Engine and apex in Megatron's clip_grads.

    Args:
        chunk_size: Not used.
        noop_flag: Not used.
        tensor_lists: One list of floating point tensors.
        per_tensor: Not used; Megatron passes False.
        *args: Not used.

    Returns:
        Norm over all tensors, fp32 ``[1]``, and None.
    """
    norms = torch.cat([norm for tensor in tensor_lists[0] for norm in norms_of_rows(tensor)])
    return torch.linalg.vector_norm(norms.double()).float().view(1), None


def multi_tensor_scale(chunk_size: int, noop_flag: Any, tensor_lists: list, scale: float) -> None:
    """Replaces ``multi_tensor_scale`` of Transformer Engine and apex in Megatron's clip_grads.

    Scales in place, without the copy of each tensor that Megatron's fallback makes.

    Args:
        chunk_size: Not used.
        noop_flag: Not used.
        tensor_lists: Sources and destinations; usually the same tensors.
        scale: Factor.
    """
    sources, destinations = tensor_lists
    if any(a.data_ptr() != b.data_ptr() for a, b in zip(sources, destinations, strict=True)):
        torch._foreach_copy_(destinations, sources)
    torch._foreach_mul_(destinations, scale)
