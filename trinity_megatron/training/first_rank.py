"""What rank 0 finds out for all ranks: a file, a disk, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def from_first_rank[Value](make: Callable[[], Value]) -> Value:
    """What a function returns on rank 0, on all ranks; one broadcast over the world.

    Args:
        make: Called on rank 0; must not raise, or the others wait.
    """
    if not torch.distributed.is_initialized():
        return make()
    box: list[Any] = [make() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
