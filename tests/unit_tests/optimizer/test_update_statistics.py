"""Statistics of a step against the change of the parameters."""

import time

import pytest
import torch
from torch.nn import Parameter

from trinity_megatron.optimizer.muon import Muon
from trinity_megatron.optimizer.update_statistics import UpdateStatistics, orthogonality_error


def test_the_squares_are_those_of_the_change() -> None:
    generator = torch.manual_seed(0)
    shapes = {"attention": (12, 8), "experts": (3, 6, 10)}
    params = {
        group: Parameter(torch.randn(shape, generator=generator)) for group, shape in shapes.items()
    }
    for group, param in params.items():
        param.gradient_group = group  # type: ignore[attr-defined]
        param.grad = torch.randn(param.shape, generator=generator)
    before = {group: param.detach().clone() for group, param in params.items()}
    optimizer = Muon(params.values(), lr=0.5, weight_decay=0.0)
    optimizer.statistics = found = UpdateStatistics()
    optimizer.step()
    for group, param in params.items():
        change = (param.detach() - before[group]).double()
        assert found.squares[group].item() == pytest.approx(change.square().sum().item(), rel=1e-5)
        assert found.numel[group] == param.numel()
    assert found.orthogonality_error is not None and 0 < found.orthogonality_error < 0.5


def test_the_error_of_an_orthogonal_matrix_is_zero() -> None:
    orthogonal = torch.linalg.qr(torch.randn(6, 6, generator=torch.manual_seed(0)))[0]
    assert orthogonality_error(orthogonal[:4]) < 1e-6
    assert orthogonality_error(orthogonal[:, :4]) < 1e-6
    # Squared singular values of 4: each is off by 3.
    assert orthogonality_error(2 * orthogonal).item() == pytest.approx(3, rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="events of the device have another clock")
def test_only_the_timed_blocks_count() -> None:
    statistics = UpdateStatistics()
    start = time.perf_counter()
    with statistics.timed():
        time.sleep(0.01)
    with statistics.timed():
        time.sleep(0.01)
    elapsed = time.perf_counter() - start
    time.sleep(0.02)
    assert 0.02 <= statistics.seconds() <= elapsed
