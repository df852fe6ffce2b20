"""Megatron's parallel linear layers, computed as one matrix product in inference on one rank.

Theirs pass through functions of autograd and their checks even then, which takes twice as long as
the product of one token.
"""

import torch
from megatron.core.tensor_parallel import layers

# The names are Megatron's: Megatron-FSDP tells by the name of a class how its weight is cut.


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """``x W^T`` with the rows of W cut over tensor-parallel ranks."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply ``[s, b, in]``; see Megatron's."""
        is_whole = self.output_size_per_partition == self.output_size
        if weight is None and is_whole and not torch.is_grad_enabled() and self.bias is None:
            return torch.matmul(input_, self.weight.t()), None
        return super().forward(input_, weight, runtime_gather_output)


class RowParallelLinear(layers.RowParallelLinear):
    """``x W^T`` with the columns of W cut over tensor-parallel ranks."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply ``[s, b, in / tp]``; see Megatron's."""
        is_whole = self.input_size_per_partition == self.input_size
        if is_whole and not torch.is_grad_enabled() and self.bias is None:
            return torch.matmul(input_, self.weight.t()), None
        return super().forward(input_)
