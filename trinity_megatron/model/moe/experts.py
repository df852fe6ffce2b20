"""Routed experts of the ``local`` implementation: stacked weights, grouped matrix products."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.device_copy import copy_to
from trinity_megatron.model.fusion import can_compile


def grouped_swiglu_experts(
    hidden_states: torch.Tensor,
    probs: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    fc1: torch.Tensor,
    fc2: torch.Tensor,
) -> torch.Tensor:
    r"""``g * W_2 (silu(W_gate x) * (W_up x))`` for rows sorted by expert.

    The routing weight multiplies the (narrow) activation instead of the output, which is the same
    number because W_2 is linear.

    Args:
        hidden_states: ``[num_rows, d]``, the rows of expert 0 first.
        probs: Routing weight of each row, ``[num_rows]``.
        tokens_per_expert: Rows of each expert, integer ``[num_experts]``; may be zero.
        fc1: ``[num_experts, 2 * ffn, d]``, gate rows first.
        fc2: ``[num_experts, d, ffn]``.

    Returns:
        ``[num_rows, d]`` in the dtype of ``hidden_states``.

    Source: report eq 15.
    """
    if _is_a_few(hidden_states, fc1.shape[0]):
        num_rows = {expert: rows for expert, rows in enumerate(tokens_per_expert.tolist()) if rows}
        hidden = _product_by_expert(hidden_states, fc1, num_rows)
        return _product_by_expert(weighted_swiglu(hidden, probs.unsqueeze(-1)), fc2, num_rows)
    ends = torch.cumsum(tokens_per_expert, dim=0, dtype=torch.int32)
    ends = copy_to(ends, hidden_states.device)
    num_columns = hidden_states.shape[-1]
    if not _is_aligned(fc1) or not _is_aligned(fc2):
        hidden_states, fc1, fc2 = _align(hidden_states, fc1, fc2)
    hidden = F.grouped_mm(hidden_states, fc1.transpose(1, 2), offs=ends)
    activation = weighted_swiglu(hidden, probs.unsqueeze(-1))
    return F.grouped_mm(activation, fc2.transpose(1, 2), offs=ends)[:, :num_columns]


def _is_a_few(hidden_states: torch.Tensor, num_experts: int) -> bool:
    """Whether most experts have no row, and the sizes may be read: a step of generation on a CPU.

    ``grouped_mm`` loops over all experts there: for one token of the tiny preset, 32 experts, it
    takes twice as long.
    """
    is_on_host = hidden_states.device.type == "cpu" and not torch.is_grad_enabled()
    return is_on_host and 0 < 4 * hidden_states.shape[0] <= num_experts


def _product_by_expert(
    rows: torch.Tensor, weight: torch.Tensor, num_rows: dict[int, int]
) -> torch.Tensor:
    """Rows ``[num_rows, in]``, sorted by expert, times the weights ``[num_experts, out, in]``."""
    parts = rows.split(list(num_rows.values()))
    return torch.cat(
        [F.linear(part, weight[expert]) for expert, part in zip(num_rows, parts, strict=True)]
    )


def weighted_swiglu(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up * weight``, on a GPU in one kernel of Megatron's for each pass.

    Args:
        hidden: Gate and up, ``[num_rows, 2 * ffn]``.
        weights: fp32 ``[num_rows, 1]``.

    Returns:
        ``[num_rows, ffn]`` in the dtype of ``hidden``.
    """
    if hidden.is_cuda and can_compile():
        return weighted_bias_swiglu_impl(hidden, None, weights)
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up * weights.to(gate.dtype)


def _is_aligned(weight: torch.Tensor) -> bool:
    return weight.shape[-1] * weight.itemsize % 16 == 0


def _align(
    hidden_states: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fill up with zeros, for ``grouped_mm`` wants rows of a multiple of 16 bytes.

    No released model needs it: their sizes are multiples of 256.
    """
    step = 16 // fc1.itemsize
    d, ffn = (-fc2.shape[1] % step, -fc2.shape[2] % step)
    gate_and_up = F.pad(fc1.unflatten(1, (2, -1)), (0, d, 0, ffn)).flatten(1, 2)
    return F.pad(hidden_states, (0, d)), gate_and_up, F.pad(fc2, (0, ffn, 0, d))


def mark_expert_weight(weight: torch.nn.Parameter, *, partition_dim: int, stride: int) -> None:
    """Say how a stacked weight is cut over ranks.

    Args:
        weight: ``[num_local_experts, out, in]``.
        partition_dim: Dimension that expert-tensor-parallel ranks divide.
        stride: 2 where each rank has a part of both halves, gate and up.
    """
    set_tensor_model_parallel_attributes(weight, True, partition_dim, stride)
    # The gradient goes to the expert-data-parallel group in every layout: with it the optimizer
    # has the same parts with and without expert parallelism, and a checkpoint fits all.
    weight.allreduce = False  # type: ignore[attr-defined]


class _StackedLinear(torch.nn.Module):
    """Holds ``weight`` ``[num_local_experts, out, in]`` and how it is cut over ranks."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        config: TrinityConfig,
        partition_dim: int,
        stride: int,
    ) -> None:
        super().__init__()
        device = torch.device("cpu")
        if not config.use_cpu_initialization:
            device = torch.device(torch.cuda.current_device())
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=device)
        )
        mark_expert_weight(self.weight, partition_dim=partition_dim, stride=stride)

    def forward(self) -> torch.Tensor:
        """The weight.  Called, so that Megatron's hook waits for it to be gathered."""
        return self.weight


class TrinityGroupedMLP(MegatronModule):
    """All experts of one rank in two stacked weights.

    Parameters: ``linear_fc1.weight`` ``[num_local_experts, 2 * ffn / etp, d]`` (gate rows, then up
    rows) and ``linear_fc2.weight`` ``[num_local_experts, d, ffn / etp]``.  In a distributed
    checkpoint both have the keys and global shapes of Megatron's ``SequentialMLP`` and
    ``TEGroupedMLP``, so that a checkpoint moves between the implementations and over any layout.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TrinityConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        assert config.moe_ffn_hidden_size is not None
        ffn, hidden = divide(config.moe_ffn_hidden_size, self.tp_group.size()), config.hidden_size
        self.linear_fc1 = _StackedLinear(
            (num_local_experts, 2 * ffn, hidden), config=config, partition_dim=1, stride=2
        )
        self.linear_fc2 = _StackedLinear(
            (num_local_experts, hidden, ffn), config=config, partition_dim=2, stride=1
        )

    def forward(
        self,
        permuted_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Run every local expert on its rows; see :func:`grouped_swiglu_experts`."""
        output = grouped_swiglu_experts(
            permuted_hidden_states,
            permuted_probs,
            tokens_per_expert,
            self.linear_fc1(),
            self.linear_fc2(),
        )
        return output, None

    def backward_dw(self) -> None:
        """Weight gradients are not delayed: nothing to do."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describe the stacked weights as slices of ``[num_experts, out, in]``."""
        return stacked_sharded_state_dict(self, prefix, sharded_offsets)


def stacked_sharded_state_dict(
    experts: Any, prefix: str, sharded_offsets: tuple
) -> ShardedStateDict:
    """Describe stacked weights as slices of ``[num_experts, out, in]``.

    Args:
        experts: Has ``linear_fc1.weight``, ``linear_fc2.weight`` and the groups ``ep_group``,
            ``tp_group`` and ``dp_group`` of experts.
        prefix: Of the module's names.
        sharded_offsets: Megatron's offsets of the axes that come before, e.g. the layers.
    """
    axis = len(sharded_offsets)
    ep_rank, ep_size = experts.ep_group.rank(), experts.ep_group.size()
    tp_rank, tp_size = experts.tp_group.rank(), experts.tp_group.size()
    replica_id = (0, 0, experts.dp_group.rank())
    common: dict[str, Any] = {"replica_id": replica_id, "prepend_axis_num": axis}

    def build_gate_and_up(
        key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        # The rank holds [its gate rows | its up rows]; the whole is [all gate | all up].  Expert by
        # expert: halves of the stack would not be contiguous, and --ckpt-fully-parallel-load
        # sends what it has read to other ranks as it lies in memory.
        count = tensor.shape[0]
        return [
            ShardedTensor.from_rank_offsets(
                key,
                half,
                *sharded_offsets,
                (axis, ep_rank * count + number, ep_size * count),
                (axis + 1, tp_rank + index * tp_size, 2 * tp_size),
                replica_id=replica_id,
                prepend_axis_num=axis,
            )
            for number, expert in enumerate(tensor.split(1))
            for index, half in enumerate(expert.chunk(2, dim=1))
        ]

    def merge_gate_and_up(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).unflatten(0, (-1, 2)).flatten(1, 2)

    fc1_key, fc2_key = (f"{prefix}experts.{fc}.weight" for fc in ("linear_fc1", "linear_fc2"))
    return {
        f"{prefix}linear_fc1.weight": ShardedTensorFactory(
            fc1_key,
            experts.linear_fc1.weight,
            build_gate_and_up,
            merge_gate_and_up,
            replica_id,
        ),
        f"{prefix}linear_fc2.weight": ShardedTensor.from_rank_offsets(
            fc2_key,
            experts.linear_fc2.weight,
            *sharded_offsets,
            (axis, ep_rank, ep_size),
            (axis + 2, tp_rank, tp_size),
            **common,
        ),
    }
