"""A stack handed out matrix by matrix, with and without fused accumulation of gradients."""

import gc
import weakref
from typing import Any

import pytest
import torch

from trinity_megatron.model.moe.expert_views import unstack

NUM_EXPERTS, ROWS, COLUMNS = 5, 3, 4


class GroupedProduct(torch.autograd.Function):
    """``x_e W_e^T`` of every expert, with Transformer Engine's manners in the backward pass.

    It holds weak references to the weights, adds to their ``main_grad``, says so, and returns
    something of the right shape.  Source: Transformer Engine 2.20, module/grouped_linear.py.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weights = [weakref.ref(weight) for weight in weights]
        return torch.stack([row @ weight.T for row, weight in zip(x, weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        wasted = []
        for row, grad, reference in zip(x, gradient, ctx.weights, strict=True):
            weight = reference()
            assert weight is not None, "the matrix is gone before the backward pass"
            weight.main_grad.add_(torch.outer(grad, row))
            weight.grad_added_to_main_grad = True
            wasted.append(torch.full_like(weight, torch.nan))
        return (None, *wasted)


def make_stack() -> torch.nn.Parameter:
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(NUM_EXPERTS, ROWS, COLUMNS, dtype=torch.float64))


def expected_gradient(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return torch.einsum("er,ec->erc", gradient, x)


def test_gradients_are_stacked() -> None:
    stack, x = make_stack(), torch.randn(NUM_EXPERTS, COLUMNS, dtype=torch.float64)
    matrices = unstack(stack, fused=False)
    assert all(torch.equal(matrix, stack[i]) for i, matrix in enumerate(matrices))
    assert all(matrix.data_ptr() == stack[i].data_ptr() for i, matrix in enumerate(matrices))
    gradient = torch.randn(NUM_EXPERTS, ROWS, dtype=torch.float64)
    sum(((w @ v) * g).sum() for w, v, g in zip(matrices, x, gradient, strict=True)).backward()
    torch.testing.assert_close(stack.grad, expected_gradient(x, gradient))


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_fused_gradients_reach_main_grad(num_micro_batches: int) -> None:
    stack = make_stack()
    stack.main_grad = torch.zeros(stack.shape, dtype=torch.float64)
    stack.grad_added_to_main_grad = False
    hook_ran = []
    stack.register_post_accumulate_grad_hook(hook_ran.append)
    expected, losses = torch.zeros_like(stack.main_grad), []
    for _ in range(num_micro_batches):  # all in flight at once, as in a pipeline
        x = torch.randn(NUM_EXPERTS, COLUMNS, dtype=torch.float64)
        gradient = torch.randn(NUM_EXPERTS, ROWS, dtype=torch.float64)
        losses.append((GroupedProduct.apply(x, *unstack(stack, fused=True)) * gradient).sum())
        expected += expected_gradient(x, gradient)
    gc.collect()
    for loss in losses:
        loss.backward()
        assert stack.grad_added_to_main_grad
        assert stack.grad is not None  # Megatron insists on one when it overlaps the reduction
        stack.grad, stack.grad_added_to_main_grad = None, False
    torch.testing.assert_close(stack.main_grad, expected)
    assert len(hook_ran) == num_micro_batches


def test_the_graph_goes_after_the_backward_pass() -> None:
    stack = make_stack()
    stack.main_grad = torch.zeros(stack.shape, dtype=torch.float64)
    matrices = unstack(stack, fused=True)
    reference = weakref.ref(matrices[0])
    x = torch.randn(NUM_EXPERTS, COLUMNS, dtype=torch.float64)
    loss = GroupedProduct.apply(x, *matrices).sum()
    del matrices
    gc.disable()  # nothing may depend on the collector of cycles
    try:
        assert reference() is not None
        loss.backward()
        del loss
        assert reference() is None
    finally:
        gc.enable()


def test_without_gradients_nothing_is_attached() -> None:
    stack = make_stack()  # no main_grad: outside of a training
    with torch.no_grad():
        matrices = unstack(stack, fused=True)
    assert not any(hasattr(matrix, "main_grad") for matrix in matrices)
