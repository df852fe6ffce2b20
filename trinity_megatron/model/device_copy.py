"""Copies of small tables between host and GPU, without a host sync."""

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device; the host does not wait for what a GPU has still to do.

    Args:
        tensor: Any; on the host it is copied through pinned memory, which torch keeps until the
            copy has been made.
        device: Of the result.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(values: Any) -> Any:
    """Copy tensors to the host together: it waits for the device once.

    Args:
        values: Nested lists of tensors of any shape and dtype whose numbers fp64 holds; anything
            else is handed on.

    Returns:
        The same with tensors on the host.
    """
    leaves, structure = tree_flatten(values)
    far = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
    if far:
        numbers = torch.cat([leaves[i].detach().double().flatten() for i in far]).cpu()
        for i, part in zip(far, numbers.split([leaves[i].numel() for i in far]), strict=True):
            leaves[i] = part.view(leaves[i].shape).to(leaves[i].dtype)
    return tree_unflatten(leaves, structure)
