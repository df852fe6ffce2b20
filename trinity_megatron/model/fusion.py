"""Small functions as one kernel on a GPU, where eager torch launches one for each operation."""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def can_compile() -> bool:
    """Whether torch may compile for a GPU here: Triton is there, and no ban on compiling."""
    from torch.utils._triton import has_triton

    return os.environ.get("TORCHDYNAMO_DISABLE") != "1" and has_triton()


def fused[**Args, Result](
    function: Callable[Args, Result], tensor: torch.Tensor
) -> Callable[Args, Result]:
    """The function, compiled where its tensors are on a GPU.

    Args:
        function: A pure one of a module: it is compiled once, for all models.
        tensor: One of its arguments.
    """
    return _compiled(function) if tensor.is_cuda and can_compile() else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
