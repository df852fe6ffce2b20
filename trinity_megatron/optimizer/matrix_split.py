"""Which matrices a parameter holds, read from its attributes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trinity_megatron.optimizer.sharded.ownership import Shard, Stack


@dataclass(frozen=True)
class MatrixSplit:
    """How the rows of a fused parameter divide into separate matrices.

    The rows are one or more equal groups; a group is a row block of every matrix, in order.  Matrix
    ``i`` is what the ``i``-th blocks of all groups form together, in the order of the groups.

    Attributes:
        sizes: Rows of each block of one group; on a tensor-parallel rank, of its own rows.
    """

    sizes: tuple[int, ...]


def make_stack(
    param: Tensor,
    shape: Sequence[int],
    holders: Sequence[tuple[Shard, ...]],
    *,
    are_replicas: bool = False,
) -> Stack:
    """Describe the matrices of a parameter and which ranks hold them.

    Args:
        param: The parameter or a shard of it, with its attributes: see `optimizer.muon`.
        shape: Shape of its tensor-parallel part, ``[out, in]`` or ``[E, out, in]``.
        holders: For each tensor-parallel rank, the shards of its part.
        are_replicas: ``holders`` are those of each replica instead, without tensor parallelism.

    Returns:
        The stack; a parameter ``[out, in]`` without ``muon_split`` is one matrix.

    Raises:
        ValueError: The attributes contradict the shape.
    """
    count, rows, columns = (1, *shape) if len(shape) == 2 else shape
    split = getattr(param, "muon_split", None) or MatrixSplit((rows,))
    if rows % sum(split.sizes):
        raise ValueError(
            f"muon_split={split.sizes}: a parameter of shape {tuple(shape)} does not hold a whole "
            f"number of groups of {sum(split.sizes)} rows"
        )
    shard_dim = None
    is_divided = getattr(param, "tensor_model_parallel", False) and not are_replicas
    if is_divided and len(holders) > 1:
        shard_dim = _matrix_dim_of_tensor_parallelism(param, shape)
    return Stack(count, rows, columns, split.sizes, shard_dim, tuple(holders))


def _matrix_dim_of_tensor_parallelism(param: Tensor, shape: Sequence[int]) -> int:
    """Dimension of each matrix that is divided: 0 rows, 1 columns; never the stack's own."""
    partition_dim: int = param.partition_dim  # type: ignore[attr-defined]
    dim = partition_dim - (len(shape) - 2)
    if dim not in (0, 1):
        raise ValueError(
            f"partition_dim={partition_dim} of a tensor-parallel parameter of shape "
            f"{tuple(shape)} does not name its rows or columns"
        )
    stride = getattr(param, "partition_stride", 1)
    if stride > 1 and getattr(param, "muon_split", None) is None:
        raise ValueError(
            f"a tensor-parallel parameter of shape {tuple(shape)} holds "
            f"{stride} matrices (partition_stride) but has no muon_split; "
            "see attach_muon_splits()"
        )
    return dim
