"""Muon against a slow reference, and parallel against serial."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from trinity_megatron.optimizer.muon import MatrixSplit, Muon
from trinity_megatron.optimizer.newton_schulz import orthogonalize


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def parameter(*shape: int, seed: int = 0, split: tuple[int, ...] = (), **attributes: Any) -> Any:
    param = Parameter(random(*shape, seed=seed))
    if split:
        param.muon_split = MatrixSplit(split)
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


def set_gradients(params: list[Any], step: int) -> None:
    for index, param in enumerate(params):
        param.grad = random(*param.shape, seed=1000 * step + index).to(param.dtype)


def model(seed: int = 0) -> list[Any]:
    """Everything at once: two layers, so that shapes repeat across parameters."""
    return [
        param
        for layer in range(2)
        for param in (
            parameter(72, 20, seed=seed + layer, split=(12, 12, 6, 6)),
            parameter(20, 24, seed=seed + layer + 10),
            parameter(3, 32, 20, seed=seed + layer + 20, split=(16, 16)),
            parameter(3, 20, 16, seed=seed + layer + 30),
            parameter(1, 20, seed=seed + layer + 40),
        )
    ]


class SlowMuon:
    """Equation by equation in float64, one separate matrix after the other."""

    def __init__(self, params: list[Any], **settings: Any) -> None:
        self.values = [param.detach().double() for param in params]
        self.momenta = [torch.zeros_like(value) for value in self.values]
        self.splits = [getattr(p, "muon_split", MatrixSplit((p.shape[-2],))) for p in params]
        self.lr, self.mu, self.decay = settings["lr"], settings["momentum"], settings["decay"]
        self.nesterov, self.scale = settings["nesterov"], settings["scale"]

    def step(self, gradients: list[Tensor]) -> None:
        for value, momentum, gradient, split in zip(
            self.values, self.momenta, gradients, self.splits, strict=True
        ):
            momentum.mul_(self.mu).add_((1 - self.mu) * gradient.double())
            update = momentum
            if self.nesterov:
                update = (1 - self.mu) * gradient.double() + self.mu * momentum
            for index in range(value.shape[0] if value.dim() == 3 else 1):
                pick = (index,) if value.dim() == 3 else ()
                for rows in self.rows_of_matrices(value.shape[-2], split.sizes):
                    matrix = update[pick][rows]
                    factor = self.scale(*matrix.shape)
                    value[pick][rows] = (1 - self.lr * self.decay) * value[pick][
                        rows
                    ] - self.lr * factor * orthogonalize(matrix)

    @staticmethod
    def rows_of_matrices(rows: int, sizes: tuple[int, ...]) -> list[list[int]]:
        matrices: list[list[int]] = [[] for _ in sizes]
        row = 0
        while row < rows:
            for matrix, size in zip(matrices, sizes, strict=True):
                matrix.extend(range(row, row + size))
                row += size
        return matrices


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("batch_elements", [None, 1, 700])
def test_equals_the_equations(nesterov: bool, batch_elements: int | None) -> None:
    params = model()
    reference = SlowMuon(
        params,
        lr=0.02,
        momentum=0.9,
        decay=0.1,
        nesterov=nesterov,
        scale=lambda fan_out, fan_in: math.sqrt(max(1, fan_out / fan_in)),
    )
    optimizer = Muon(
        params,
        lr=0.02,
        momentum=0.9,
        weight_decay=0.1,
        nesterov=nesterov,
        batch_elements=batch_elements,
    )
    for step in range(3):
        set_gradients(params, step)
        reference.step([param.grad for param in params])
        optimizer.step()
    for param, expected in zip(params, reference.values, strict=True):
        torch.testing.assert_close(param.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("scale", "factors"),
    [
        ("shape_scaling", (2.0, 1.0)),
        ("spectral", (math.sqrt(32), math.sqrt(32))),
        ("unit_rms_norm", (2.0, 0.5)),
    ],
)
def test_scale_is_of_the_separate_matrix(scale: str, factors: tuple[float, float]) -> None:
    """gate|up [64, 8] is two matrices [32, 8]: the report's factor is 2, not sqrt(8)."""
    params = [parameter(64, 8, split=(32, 32)), parameter(8, 32)]
    before = [param.detach().clone() for param in params]
    set_gradients(params, 1)
    Muon(params, lr=0.5, weight_decay=0.0, scale=scale, extra_scale_factor=3.0).step()
    for param, old, factor in zip(params, before, factors, strict=True):
        expected = torch.cat(
            [orthogonalize(m) for m in (param.grad.chunk(2) if len(param) == 64 else [param.grad])]
        )
        torch.testing.assert_close(
            (old - param) / (0.5 * 3.0 * factor), expected, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("shape", "sizes"), [((2, 32, 20), (16, 16)), ((72, 20), (12, 12, 6, 6)), ((64, 8), (32, 32))]
)
def test_split_equals_separate_bit_for_bit(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    fused = parameter(*shape, split=sizes)
    groups = shape[-2] // sum(sizes)

    def separate(tensor: Tensor) -> list[Tensor]:
        """By slices: the i-th blocks of all groups, below each other."""
        parts = []
        for i, size in enumerate(sizes):
            starts = [group * sum(sizes) + sum(sizes[:i]) for group in range(groups)]
            parts.append(torch.cat([tensor[..., s : s + size, :] for s in starts], dim=-2))
        return parts

    parts = [Parameter(part.clone()) for part in separate(fused.detach())]
    fused_muon, parts_muon = Muon([fused], batch_elements=1), Muon(parts, batch_elements=1)
    for step in range(3):
        fused.grad = random(*shape, seed=step)
        for part, gradient in zip(parts, separate(fused.grad), strict=True):
            part.grad = gradient.clone()
        fused_muon.step()
        parts_muon.step()
    for part, expected in zip(parts, separate(fused.detach()), strict=True):
        assert torch.equal(part, expected)


def test_experts_do_not_mix() -> None:
    """A stack is orthogonalized expert by expert, never over the expert axis."""
    first, second = parameter(4, 16, 10), parameter(4, 16, 10)
    set_gradients([first], 1)
    second.grad = first.grad.clone()
    second.grad[2] *= -3.0
    Muon([first]).step()
    Muon([second]).step()
    others = [0, 1, 3]
    assert torch.equal(first[others], second[others])
    assert not torch.equal(first[2], second[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_equals_uninterrupted_bit_for_bit(dtype: torch.dtype) -> None:
    params = [parameter(24, 20, split=(12, 12)), parameter(2, 8, 30)]
    params = [Parameter(p.detach().to(dtype)) for p in params]
    optimizer = Muon(params, lr=0.1)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = copy.deepcopy(params)
    other = Muon(resumed, lr=0.7)
    other.load_state_dict(saved)
    for run, run_params in ((optimizer, params), (other, resumed)):
        for step in range(2, 4):
            set_gradients(run_params, step)
            run.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_state_is_one_float32_tensor_of_the_parameters_shape() -> None:
    params = [Parameter(torch.ones(4, 6).bfloat16()), parameter(2, 4, 6)]
    optimizer = Muon(params)
    optimizer.init_state()
    for param in params:
        assert list(optimizer.state[param]) == ["momentum_buffer"]
        assert optimizer.state[param]["momentum_buffer"].shape == param.shape
        assert optimizer.state[param]["momentum_buffer"].dtype == torch.float32


def test_parameters_without_gradient_and_empty_groups_are_left_alone() -> None:
    params = [parameter(4, 6), parameter(4, 6, seed=1)]
    before = params[0].detach().clone()
    optimizer = Muon([{"params": params}, {"params": [], "lr": 1.0}])
    assert optimizer.step(lambda: 2.5) == 2.5
    params[1].grad = torch.ones(4, 6)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state


def test_refusals_name_the_remedy() -> None:
    matrix = parameter(4, 6)
    with pytest.raises(ValueError, match="AdamW"):
        Muon([parameter(4)])
    with pytest.raises(ValueError, match="choose one of .*'shape_scaling'"):
        Muon([matrix], scale="keller")
    with pytest.raises(ValueError, match="momentum=-1"):
        Muon([matrix], momentum=-1)
    with pytest.raises(ValueError, match="'quintik'"):
        Muon([matrix], coefficients="quintik")
    fused = parameter(10, 6, split=(4, 4))
    set_gradients([fused], 0)
    with pytest.raises(ValueError, match="whole number of groups of 8 rows"):
        Muon([fused]).step()


# --- tensor parallelism ---------------------------------------------------------------------------

TP = {"tensor_model_parallel": True}


def test_a_copy_and_a_new_group_are_stepped() -> None:
    params = [parameter(8, 6, seed=1), parameter(8, 6, seed=2)]
    optimizer = Muon(params[:1], lr=0.1, weight_decay=0.0)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:]})
    before = params[1].detach().clone()
    optimizer.step()
    # A direction of singular values near one, at the learning rate.
    change = torch.linalg.matrix_norm(params[1].detach() - before, 2)
    assert change == pytest.approx(0.1 * (8 / 6) ** 0.5, rel=0.2)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        optimizer.add_param_group({"params": [parameter(8)]})
    copied = copy.deepcopy(optimizer)
    twins = [param for group in copied.param_groups for param in group["params"]]
    for step in (1, 2):
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        copied.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


EXPERT = {**TP, "allreduce": False}


def whole_model(*, experts: bool) -> list[Any]:
    """Parameters before they are divided; shapes repeat over two layers."""
    if experts:
        return [
            param
            for layer in range(2)
            for param in (
                parameter(3, 32, 20, seed=layer, split=(16, 16), partition_dim=1, **EXPERT),
                parameter(3, 20, 16, seed=layer + 10, partition_dim=2, **EXPERT),
            )
        ]
    return [
        param
        for layer in range(2)
        for param in (
            parameter(72, 20, seed=layer, split=(12, 12, 6, 6), partition_dim=0, **TP),
            parameter(20, 24, seed=layer + 10, partition_dim=1, **TP),
            parameter(40, 20, seed=layer + 20, split=(20, 20), partition_dim=0, **TP),
            parameter(5, 20, seed=layer + 50),  # a router: whole on every rank
        )
    ]


def shard(tensor: Tensor, whole: Any, rank: int) -> Tensor:
    """What a rank of two holds of ``tensor``; of gate|up it holds half of each."""
    dim = getattr(whole, "partition_dim", None)
    if dim is None:
        return tensor.clone()
    pieces = tensor.chunk(2, dim) if is_pair(whole) else (tensor,)
    return torch.cat([piece.chunk(2, dim)[rank] for piece in pieces], dim)


def is_pair(whole: Any) -> bool:
    return len(getattr(whole, "muon_split", MatrixSplit(())).sizes) == 2


def shard_parameter(whole: Any, rank: int) -> Any:
    piece: Any = Parameter(shard(whole.detach(), whole, rank))
    piece.__dict__.update(whole.__dict__)
    if is_pair(whole):
        piece.muon_split = MatrixSplit(tuple(size // 2 for size in whole.muon_split.sizes))
    return piece


def rank_main(rank: int, store: str) -> None:
    init_method = f"file://{store}"
    torch.distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=2)
    both = torch.distributed.group.WORLD
    alone = [torch.distributed.new_group([r]) for r in range(2)][rank]
    # Each kind in its own group: gathering over the other one would change nothing, wrongly.
    compare_with_serial(rank, whole_model(experts=False), tp_group=both, expert_tp_group=alone)
    compare_with_serial(rank, whole_model(experts=True), tp_group=alone, expert_tp_group=both)
    refuse_contradictions(both)
    torch.distributed.destroy_process_group()


def compare_with_serial(rank: int, whole: list[Any], **groups: Any) -> None:
    """Three steps; to the owners and back, one collective each, however many matrices there are."""
    calls: list[int] = []
    all_to_all = torch.distributed.all_to_all_single

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return all_to_all(*args, **kwargs)

    pieces = [shard_parameter(param, rank) for param in whole]
    serial, parallel = Muon(whole, lr=0.1), Muon(pieces, lr=0.1, **groups)
    for step in range(3):
        set_gradients(whole, step)
        for param, piece in zip(whole, pieces, strict=True):
            piece.grad = shard(param.grad, param, rank)
        serial.step()
        torch.distributed.all_to_all_single = counted
        parallel.step()
        torch.distributed.all_to_all_single = all_to_all
    assert len(calls) == 3 * 2, len(calls)
    for param, piece in zip(whole, pieces, strict=True):
        expected = shard(param.detach(), param, rank)
        torch.testing.assert_close(piece.detach(), expected, rtol=0, atol=2e-6)


def refuse_contradictions(group: Any) -> None:
    for attributes, message in (
        ({"partition_dim": -1}, "does not name its rows or columns"),
        ({"partition_dim": 0, "partition_stride": 2}, "has no muon_split"),
    ):
        param = parameter(4, 6, **TP, **attributes)
        set_gradients([param], 0)
        with pytest.raises(ValueError, match=message):
            Muon([param], tp_group=group).step()


@pytest.mark.distributed
def test_tensor_parallel_step_equals_serial(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        rank_main, (str(tmp_path / "store"),), nprocs=2, start_method="fork"
    )
