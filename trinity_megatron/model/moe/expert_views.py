"""Views of the matrices of a stacked expert weight; their gradients accumulate into the stack."""

from typing import Any

import torch


class _Unstack(torch.autograd.Function):
    """``[E, out, in]`` -> E views ``[out, in]``."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.stack, ctx.fused_matrices = stack, None
        return stack.unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        matrices, ctx.fused_matrices = ctx.fused_matrices, None
        if matrices is None:
            return torch.stack(gradients)
        assert all(matrix.grad_added_to_main_grad for matrix in matrices)
        # The gradient is in main_grad.  What is returned makes Megatron's hook run and is not read.
        ctx.stack.grad_added_to_main_grad = True
        return torch.empty_like(ctx.stack)


def unstack(stack: torch.Tensor, *, fused: bool) -> tuple[torch.Tensor, ...]:
    """Return the matrices of a stacked weight.

    Args:
        stack: ``[E, out, in]``, a parameter.
        fused: Whether the product that takes the matrices adds their gradients to ``main_grad``
            itself (Megatron's ``gradient_accumulation_fusion``).  Each matrix then has its part of
            ``stack.main_grad`` (fp32), and ``grad_added_to_main_grad`` of the stack is set as
            Transformer Engine sets it for a parameter of its own.

    Returns:
        E views ``[out, in]``.
    """
    matrices = _Unstack.apply(stack)
    if fused and torch.is_grad_enabled() and stack.requires_grad:
        for matrix, main_grad in zip(matrices, stack.main_grad.unbind(0), strict=True):  # type: ignore[attr-defined]
            matrix.main_grad, matrix.grad_added_to_main_grad = main_grad, False
        # Transformer Engine holds weak references to its weights: the graph keeps them alive.
        matrices[0].grad_fn.fused_matrices = matrices
    return matrices
