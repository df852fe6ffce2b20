"""The gradient norm on a GPU without Transformer Engine and apex, without a host sync per tensor.

Megatron's fallbacks read the norm of every tensor from the device, and scale tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor

from trinity_megatron.upstream.registry import replaced

_MODULE = "megatron.core.optimizer.clip_grads"


@contextmanager
def norms_on_device() -> Iterator[None]:
    """Replace Megatron's fallbacks, if it uses them, while the block runs."""
    with ExitStack() as stack:
        if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
            stack.enter_context(replaced(f"{_MODULE}:l2_norm_impl", lambda _: l2_norm))
            stack.enter_context(replaced(f"{_MODULE}:multi_tensor_scale_impl", lambda _: scale))
            # With it Megatron leaves the norm on the device.
            target = f"{_MODULE}:multi_tensor_scale_tensor_impl"
            stack.enter_context(replaced(target, lambda _: scale))
        yield


def l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    """Norm over all tensors of the one list, fp32 ``[1]``, and None.

    The other arguments are those of Transformer Engine's ``multi_tensor_l2norm``, and not used.
    """
    norms = torch._foreach_norm(tensor_lists[0], 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def scale(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], factor: float | Tensor
) -> None:
    """Write the first list times a factor to the second; most often they are the same.

    Takes what ``multi_tensor_scale`` and ``multi_tensor_scale_tensor`` take.
    """
    sources, targets = tensor_lists
    if any(a.data_ptr() != b.data_ptr() for a, b in zip(sources, targets, strict=True)):
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, factor.view(()) if isinstance(factor, Tensor) else factor)
