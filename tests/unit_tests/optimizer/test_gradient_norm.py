"""The gradient norm of a GPU without extensions, against float64."""

import pytest
import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.core import utils  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402

from trinity_megatron.optimizer.gradient_norm import l2_norm, norms_on_device, scale  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_all_tensors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in ((7, 5), (3,), (64, 33), (1, 1))]
    found, _ = l2_norm(0, None, [tensors], False)
    exact = sum(tensor.double().square().sum() for tensor in tensors).sqrt()
    assert found.shape == (1,) and found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=3e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_none(bad: float) -> None:
    tensors = [torch.ones(3), torch.tensor([1.0, bad])]
    assert not l2_norm(0, None, [tensors], False)[0].isfinite()


@pytest.mark.parametrize("factor", [0.25, torch.tensor([0.25])])
def test_scaling(factor: float | torch.Tensor) -> None:
    sources = [torch.arange(6.0).view(2, 3), torch.ones(2)]
    targets = [torch.empty_like(tensor) for tensor in sources]
    scale(0, None, [sources, targets], factor)
    assert all(torch.equal(b, a * 0.25) for a, b in zip(sources, targets, strict=True))
    scale(0, None, [sources, sources], factor)
    assert all(torch.equal(a, b) for a, b in zip(sources, targets, strict=True))


def test_only_the_fallbacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_an_extension() -> None:
        """Stands for what Transformer Engine or apex bring."""

    monkeypatch.setattr(clip_grads, "l2_norm_impl", of_an_extension)
    with norms_on_device():
        assert clip_grads.l2_norm_impl is of_an_extension
    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    with norms_on_device():
        assert clip_grads.l2_norm_impl is l2_norm
        assert clip_grads.multi_tensor_scale_tensor_impl is scale
    assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm
    assert clip_grads.multi_tensor_scale_tensor_impl is None
