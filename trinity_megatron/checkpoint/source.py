"""The interface of a source of Megatron tensors: a checkpoint on disk or a model in memory."""

from collections.abc import Sequence
from typing import Protocol

import torch

from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.transforms import Shape

# Dtype and unsharded shape of each tensor, by Megatron name.
Tensors = dict[str, tuple[torch.dtype, Shape]]


class MegatronSource(Protocol):
    """A checkpoint on disk or a model in memory."""

    def model_tensors(self) -> Tensors:
        """Dtype and unsharded shape of every tensor of the model."""

    def parts(self, key: str) -> list[list[Part]]:
        """The stored parts of a tensor; parts that are columns of the same rows in one list."""

    def read(self, parts: Sequence[Part]) -> torch.Tensor:
        """Concatenate parts that are columns of the same rows, in the dtype of the tensor."""
