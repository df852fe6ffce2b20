"""Routed experts of the ``transformer_engine`` implementation: its grouped GEMM, stacked weights.

Importing this module needs Transformer Engine; only ``layer_specs`` does, when it is asked for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TERowParallelGroupedLinear,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.moe.expert_views import unstack
from trinity_megatron.model.moe.experts import mark_expert_weight, stacked_sharded_state_dict
from trinity_megatron.model.norms import expect_no_extra_state


class _StackedGroupedLinear:
    """Keeps the weights of a ``TEGroupedLinear`` in one parameter ``weight`` ``[E, out, in]``.

    Transformer Engine has a parameter for each expert.  In one stack an expert layer has the names
    and shapes of the ``local`` implementation, for checkpoints, Muon and the initialisation alike,
    and the optimizer sees one tensor instead of hundreds.
    """

    num_gemms: int
    fuse_wgrad_accumulation: bool

    def _stack(self, *, partition_dim: int, stride: int) -> None:
        """Put one parameter in the place of ``weight0``, ``weight1``, ..."""
        assert isinstance(self, torch.nn.Module)
        matrices = [self._parameters.pop(f"weight{i}") for i in range(self.num_gemms)]
        first = matrices[0]
        assert first is not None
        stack = torch.empty((self.num_gemms, *first.shape), dtype=first.dtype, device=first.device)
        # Not Transformer Engine's own register_parameter, which wants an initialisation for it.
        torch.nn.Module.register_parameter(self, "weight", torch.nn.Parameter(stack))
        mark_expert_weight(self.weight, partition_dim=partition_dim, stride=stride)  # type: ignore[arg-type]
        self._matrices: Sequence[torch.Tensor] | None = None
        self._register_load_state_dict_pre_hook(expect_no_extra_state)

    def _get_weight_tensors(self) -> list[torch.Tensor]:
        """The matrices in the order of the experts; Transformer Engine's hook."""
        matrices = self._matrices
        return list(self.weight.detach().unbind(0) if matrices is None else matrices)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, m_splits: Sequence[int]) -> Any:
        """``x`` ``[num_rows, in]``, the rows of expert 0 first -> ``[num_rows, out]``, None."""
        self._matrices = unstack(self.weight, fused=self.fuse_wgrad_accumulation)  # type: ignore[attr-defined]
        try:
            return super().forward(x, m_splits)  # type: ignore[misc]
        finally:
            self._matrices = None

    # Megatron and Transformer Engine would cut a stack that is loaded into weight0, weight1, ...

    def _normalize_grouped_parameter_keys(self, *args: object) -> None:
        """The stack is loaded as it is."""

    def _remap_grouped_weight_state_dict_keys(self, *args: object) -> None:
        """The stack is loaded as it is."""


class TrinityColumnGroupedLinear(_StackedGroupedLinear, TEColumnParallelGroupedLinear):
    """Gate and up projections of all experts of a rank: ``[E, 2 * ffn / etp, d]``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stack(partition_dim=1, stride=2)


class TrinityRowGroupedLinear(_StackedGroupedLinear, TERowParallelGroupedLinear):
    """Down projections of all experts of a rank: ``[E, d, ffn / etp]``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stack(partition_dim=2, stride=1)


class TrinityTEGroupedMLP(TEGroupedMLP):
    """All experts of one rank on Transformer Engine's grouped GEMM, in bf16 or FP8.

    Parameters, shapes, shardings and checkpoint keys are those of
    :class:`~trinity_megatron.model.moe.experts.TrinityGroupedMLP`.  In FP8 Megatron pads the rows
    of every expert with zeros to what the recipe needs.
    """

    config: TrinityConfig

    def __init__(
        self,
        num_local_experts: int,
        config: TrinityConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(
            num_local_experts,
            config,
            GroupedMLPSubmodules(TrinityColumnGroupedLinear, TrinityRowGroupedLinear),
            pg_collection=pg_collection,
            name=name,
        )
        self.dp_group = pg_collection.expt_dp

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describe the stacked weights, and with delayed scaling the history of its scales."""
        state = stacked_sharded_state_dict(self, prefix, sharded_offsets)
        if self.config.fp8 and self.config.fp8_recipe == "delayed":
            upstream = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            state.update({key: value for key, value in upstream.items() if "_extra_state" in key})
        return state
