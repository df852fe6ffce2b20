"""What the reader and the writer share: parts of tensors, and the key of the common state."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.filesystem import _StorageInfo

from trinity_megatron.checkpoint.transforms import Shape

# Key under which Megatron stores everything that is not a tensor: arguments, iteration.
COMMON_STATE_KEY = "common_state/shard_0_1"


@dataclass(frozen=True)
class Part:
    """A stored part of a Megatron tensor.

    Attributes:
        key: Name of the tensor.
        start: Offset of the part in the unsharded tensor.
        shape: Shape of the part.
    """

    key: str
    start: Shape
    shape: Shape


def share_of(infos: Sequence[_StorageInfo], rank: int, ranks: int) -> list[_StorageInfo]:
    """The items that lie in one of equal stretches of a checkpoint's bytes, in their order.

    Args:
        infos: Places of all items.
        rank: Of the stretches.
        ranks: Their number.
    """
    ordered = sorted(infos, key=lambda info: (info.relative_path, info.offset))
    total = sum(info.length for info in ordered) or 1
    share, at = [], 0
    for info in ordered:
        if min((at + info.length // 2) * ranks // total, ranks - 1) == rank:
            share.append(info)
        at += info.length
    return share
