"""Weight gradients of dense matrices added to ``main_grad`` by the product that makes them.

Megatron's linear layers take that product from an extension of apex.  torch has it too: the
gradient is not written in bf16, read again and added, and it is rounded once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from trinity_megatron.upstream.registry import replaced

_LAYERS = "megatron.core.tensor_parallel.layers"
_OF_APEX = "fused_weight_gradient_mlp_cuda"


def has_apex_product() -> bool:
    """Whether apex's extension is installed; nothing is imported."""
    return importlib.util.find_spec(_OF_APEX) is not None


@contextmanager
def products_into_main_grad() -> Iterator[None]:
    """Give Megatron's linear layers torch's product, if apex is missing, while the block runs."""
    if has_apex_product():
        yield
        return
    product = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    with (
        replaced(f"{_LAYERS}:{_OF_APEX}", lambda _: product),
        replaced(f"{_LAYERS}:_grad_accum_fusion_available", lambda _: True),
    ):
        yield


def add_weight_gradient(
    inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
) -> None:
    """Add ``grad_output^T inputs`` to ``main_grad``, in place.

    Args:
        inputs: Of the layer, ``[tokens, in]``.
        grad_output: Gradient of its output, ``[tokens, out]``, same dtype.
        main_grad: ``[out, in]``, of that dtype or fp32.
    """
    left, dtype = grad_output.t(), main_grad.dtype
    if dtype == inputs.dtype:
        torch.addmm(main_grad, left, inputs, out=main_grad)
    elif main_grad.is_cuda:
        torch.addmm(main_grad, left, inputs, out_dtype=dtype, out=main_grad)
    else:  # a CPU has no product of two dtypes
        torch.addmm(main_grad, left.to(dtype), inputs.to(dtype), out=main_grad)
