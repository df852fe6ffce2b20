"""The equations of Muon on lists of tensors: momentum, direction and update."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Elements orthogonalized at once.  On a CPU a batch should stay in the cache; on a GPU it should
# fill the device, at about 20 bytes of scratch memory for an element.
_CPU_BATCH_ELEMENTS = 2**19
_CUDA_BATCH_ELEMENTS = 2**28


class ParameterStep(NamedTuple):
    """What a step needs of one parameter besides its values.

    Attributes:
        gradient: Of the parameter's shape.
        momentum: Of the parameter's shape, updated for this step.
        momentum_factor: Factor of the old momentum.
        learning_rate: Of the parameter's group.
    """

    gradient: Tensor
    momentum: Tensor
    momentum_factor: float
    learning_rate: float


@dataclass(frozen=True)
class UpdateRule:
    """How momentum and gradient become an update; see `Muon` for the equations.

    Attributes:
        orthogonalize: Maps ``[count, fan_out, fan_in]`` to the orthogonalized matrices.
        scale: Maps fan_out and fan_in of a separate, whole matrix to the factor of its learning
            rate.
        nesterov: Whether the direction looks one step ahead.
        dtype: What is computed in; by default bfloat16 on CUDA, elsewhere the directions' own.
        batch_elements: Elements orthogonalized at once; default 2**28 on CUDA, 2**19 on CPU.
    """

    orthogonalize: Callable[[Tensor], Tensor]
    scale: Callable[[int, int], float]
    nesterov: bool
    dtype: torch.dtype | None
    batch_elements: int | None

    def direction(self, step: ParameterStep) -> Tensor:
        """U of one parameter, of its shape: the momentum itself, or a new tensor with Nesterov."""
        if not self.nesterov:
            return step.momentum
        return lerp(step.gradient, step.momentum, step.momentum_factor)

    def directions(
        self, gradients: list[Tensor], momenta: list[Tensor], momentum_factors: list[float]
    ) -> list[Tensor]:
        """`direction` of several parameters or views of them, in one launch where dtypes agree."""
        if not self.nesterov:
            return momenta
        if _have_equal_dtypes(gradients, momenta):
            return list(torch._foreach_lerp(gradients, momenta, momentum_factors))
        return [lerp(*each) for each in zip(gradients, momenta, momentum_factors, strict=True)]

    def compute_dtype(self, device: torch.device, default: torch.dtype) -> torch.dtype:
        """What Newton-Schulz computes in on a device; ``default`` where the device has none."""
        return self.dtype or (torch.bfloat16 if device.type == "cuda" else default)

    def batch_size(self, device: torch.device, shape: Sequence[int]) -> int:
        """How many matrices of a shape are orthogonalized at once, at least 1."""
        default = _CUDA_BATCH_ELEMENTS if device.type == "cuda" else _CPU_BATCH_ELEMENTS
        return max(1, (self.batch_elements or default) // max(1, shape[0] * shape[1]))


def update_momenta(momenta: list[Tensor], gradients: list[Tensor], factor: float) -> None:
    """``M <- factor M + (1 - factor) G``, in place.

    Args:
        momenta: Any shapes.
        gradients: One for each, of its shape.
        factor: From 0 to below 1.
    """
    if _have_equal_dtypes(momenta, gradients):
        torch._foreach_lerp_(momenta, gradients, 1.0 - factor)
        return
    for momentum, gradient in zip(momenta, gradients, strict=True):  # one rounding, not two
        momentum.copy_(lerp(momentum, gradient, 1.0 - factor))


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """``start + weight (end - start)`` in the more precise dtype of the two."""
    dtype = torch.promote_types(start.dtype, end.dtype)
    return torch.lerp(start.to(dtype), end.to(dtype), weight)


class UpdatesByStepSize:
    """Updates of one step, gathered so that those of one step size are applied in one launch."""

    def __init__(self) -> None:
        self._weights: dict[float, list[Tensor]] = defaultdict(list)
        self._updates: dict[float, list[Tensor]] = defaultdict(list)

    def add(self, step_size: float, weight: Tensor, update: Tensor) -> None:
        """Add a weight, or a view of one, and its update, of the same shape."""
        self._weights[step_size].append(weight)
        self._updates[step_size].append(update)

    def apply(self) -> None:
        """``p <- p - step_size update`` for all of them."""
        for step_size, weights in self._weights.items():
            torch._foreach_add_(weights, self._updates[step_size], alpha=-step_size)


def _have_equal_dtypes(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype for a, b in zip(tensors, others, strict=True))
