"""Small tables of the host on their way to a GPU."""

import torch


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
