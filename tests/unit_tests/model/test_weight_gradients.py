"""Weight gradients that the product adds to ``main_grad``, against float64."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit_tests.parallel_state import one_rank_world
from trinity_megatron.model.weight_gradients import add_weight_gradient, products_into_main_grad

BF16, FP32 = torch.bfloat16, torch.float32
TOKENS, IN, OUT = 96, 24, 16
# Half a unit in the last place of the sum, and what fp32 loses in a sum over the tokens.
BOUNDS = {BF16: 2**-8, FP32: 1e-6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank_world(tmp_path_factory.mktemp("store") / "store"):
        yield


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error over the largest entry."""
    return float((result.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    ("dtype", "sum_dtype"), [(BF16, FP32), (FP32, FP32), (BF16, BF16)], ids=str
)
def test_a_product_is_added_and_rounded_once(dtype: torch.dtype, sum_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    main_grad = torch.randn(OUT, IN, generator=generator).to(sum_dtype)
    inputs = torch.randn(TOKENS, IN, generator=generator).to(dtype)
    grad = torch.randn(TOKENS, OUT, generator=generator).to(dtype)
    exact = main_grad.double() + grad.double().t() @ inputs.double()
    memory = main_grad.data_ptr()
    add_weight_gradient(inputs, grad, main_grad)
    assert main_grad.data_ptr() == memory
    assert error(main_grad, exact) <= BOUNDS[sum_dtype]


def make_layer(kind: str, *, fused: bool) -> torch.nn.Module:
    """One of Megatron's linear layers in bf16 under its data parallelism, fp32 gradients."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.tensor_parallel import layers

    from trinity_megatron.model.presets import trinity_preset

    config = trinity_preset("tiny", bf16=True, params_dtype=BF16)
    config.gradient_accumulation_fusion = fused
    own = {"bias": False, "init_method": torch.nn.init.normal_, "skip_bias_add": True}
    if kind == "ColumnParallelLinear":
        layer = layers.ColumnParallelLinear(IN, OUT, config=config, **own)
    else:
        layer = layers.RowParallelLinear(IN, OUT, config=config, input_is_parallel=True, **own)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, settings, layer.to(BF16))


@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
def test_megatrons_layers_add_micro_batch_to_micro_batch(world: None, kind: str) -> None:
    """Their gradient is that of float64, and closer to it than rounded gradients are."""
    errors = {}
    for fused in (True, False):
        with products_into_main_grad():
            generator = torch.Generator().manual_seed(1)
            model = make_layer(kind, fused=fused)
            (weight,) = model.parameters()
            torch.nn.init.ones_(weight)
            exact = torch.zeros(OUT, IN, dtype=torch.float64)
            for _ in range(3):
                x = torch.randn(TOKENS, 1, IN, generator=generator).bfloat16().requires_grad_()
                grad = torch.randn(TOKENS, 1, OUT, generator=generator).bfloat16()
                model(x)[0].backward(grad)
                exact += grad.squeeze(1).double().t() @ x.detach().squeeze(1).double()
                assert weight.grad_added_to_main_grad == fused and weight.grad is None
                expected = grad @ weight.detach()
                torch.testing.assert_close(x.grad, expected)
            errors[fused] = error(weight.main_grad, exact)
    assert errors[True] <= BOUNDS[FP32] < errors[False]


def test_megatron_is_left_as_it_was(world: None) -> None:
    from megatron.core.tensor_parallel import layers

    with products_into_main_grad():
        assert layers._grad_accum_fusion_available
        assert layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 is add_weight_gradient
    assert not hasattr(layers, "fused_weight_gradient_mlp_cuda")
    assert not layers._grad_accum_fusion_available


def test_apex_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: None) -> None:
    from megatron.core.tensor_parallel import layers

    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with products_into_main_grad():
        assert not layers._grad_accum_fusion_available  # as Megatron has found it here
