"""What the reader and the writer share: parts of tensors, and the key of the common state."""

from dataclasses import dataclass

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
