"""Megatron's parallel linear layers, which are one product where there are no gradients and peers.

Theirs pass four functions of autograd and their checks even then, which takes twice as long as the
product of one token.  The names are Megatron's: Megatron-FSDP knows by them how a weight is cut.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import layers


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """``x W^T`` with the rows of W cut over tensor-parallel ranks."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply ``[s, b, in]``; see Megatron's."""
        if weight is None and _is_product(self, self.output_size_per_partition == self.output_size):
            return torch.matmul(input_, self.weight.t()), None
        return super().forward(input_, weight, runtime_gather_output)


class RowParallelLinear(layers.RowParallelLinear):
    """``x W^T`` with the columns of W cut over tensor-parallel ranks."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply ``[s, b, in / tp]``; see Megatron's."""
        if _is_product(self, self.input_size_per_partition == self.input_size):
            return torch.matmul(input_, self.weight.t()), None
        return super().forward(input_)


def _is_product(layer: Any, is_whole: bool) -> bool:
    """Whether nothing but the product is left of Megatron's forward pass."""
    return is_whole and not torch.is_grad_enabled() and layer.bias is None
