"""Several Muon optimizers at once: equal to each alone, and sharded equal to serial."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from trinity_megatron.optimizer.matrix_split import MatrixSplit, make_stack
from trinity_megatron.optimizer.muon import Muon
from trinity_megatron.optimizer.sharded import exchange
from trinity_megatron.optimizer.sharded.coordinator import MuonCoordinator
from trinity_megatron.optimizer.sharded.matrix_placement import MatrixPlacement
from trinity_megatron.optimizer.sharded.ownership import (
    Assignment,
    Shard,
    Stack,
    list_matrices,
    own_matrices,
)

DENSE = (((72, 20), (12, 12, 6, 6)), ((20, 24), ()), ((40, 20), (20, 20)), ((5, 20), ()))
EXPERTS = (((6, 32, 20), (16, 16)), ((6, 20, 16), ()))


def whole_parameters(shapes: Any, seed: int) -> list[Any]:
    params = []
    for number, (shape, split) in enumerate(shapes):
        param: Any = Parameter(torch.randn(shape, generator=torch.manual_seed(seed + number)))
        if split:
            param.muon_split = MatrixSplit(split)
        params.append(param)
    return params


def gradient(param: Tensor, number: int, step: int) -> Tensor:
    return torch.randn(param.shape, generator=torch.manual_seed(1000 * step + number))


def set_gradients(params: list[Any], step: int) -> None:
    for number, param in enumerate(params):
        param.grad = gradient(param, number, step)


def test_started_together_equals_each_alone_bit_for_bit() -> None:
    """And the step of one optimizer leaves the parameters of the other alone."""
    together, alone = ([whole_parameters(s, 0) for s in (DENSE, EXPERTS)] for _ in range(2))
    optimizers = [Muon(params, lr=0.1) for params in together]
    coordinator = MuonCoordinator(optimizers)
    alone_optimizers = [Muon(params, lr=0.1) for params in alone]
    for step in range(3):
        for params in (*together, *alone):
            set_gradients(params, step)
        coordinator.start_steps()
        for optimizer in optimizers:
            optimizer.step()
        before = [param.detach().clone() for param in alone[1]]
        alone_optimizers[0].step()
        assert all(torch.equal(a, b) for a, b in zip(before, alone[1], strict=True))
        alone_optimizers[1].step()
    for params, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_a_step_is_started_once() -> None:
    optimizer = Muon(whole_parameters(DENSE, 0))
    optimizer.start_step()
    with pytest.raises(AssertionError, match="not finished"):
        optimizer.start_step()


# --- ranks ----------------------------------------------------------------------------------------


class ShardedCopy:
    """This rank's shards of whole parameters, flat, under a Muon of their own.

    Args:
        whole: The parameters.
        seed: Of the cuts between the two ranks, which may lie inside a row.
    """

    def __init__(self, whole: list[Any], seed: int) -> None:
        self.whole, self.rank = whole, torch.distributed.get_rank()
        generator = torch.manual_seed(seed)
        self.cuts = [int(torch.randint(0, p.numel() + 1, (), generator=generator)) for p in whole]
        self.cuts[-1] = whole[-1].numel()  # rank 1 holds nothing of it
        self.shards: list[Any] = [Parameter(self.part(p, n)) for n, p in enumerate(whole)]
        self.stacks: list[Stack] = [
            make_stack(p, p.shape, [(Shard(0, 0, cut), Shard(1, cut, p.numel()))])
            for p, cut in zip(whole, self.cuts, strict=True)
        ]
        self.muon = Muon([{"params": []}], lr=0.1)
        # As Megatron's distributed optimizer does it: shards in place of parameters.
        self.muon.param_groups[0]["params"] = [s for s in self.shards if len(s)]

    def part(self, tensor: Tensor, number: int) -> Tensor:
        cut = self.cuts[number]
        flat = tensor.detach().flatten()
        return (flat[:cut] if self.rank == 0 else flat[cut:]).clone()

    def place(self, assignment: Assignment) -> None:
        self.muon.place(
            [
                MatrixPlacement(
                    stacks=self.stacks,
                    tensors=[shard if len(shard) else None for shard in self.shards],
                    assignment=assignment,
                    device=torch.device("cpu"),
                    group=torch.distributed.group.WORLD,
                    rank=self.rank,
                )
            ]
        )

    def set_gradients(self) -> None:
        for number, (shard, param) in enumerate(zip(self.shards, self.whole, strict=True)):
            shard.grad = self.part(param.grad, number)


def record_exchange(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of sends and waits, as they come."""
    calls: list[str] = []

    def recorded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return wrapper

    send = torch.distributed.all_to_all_single
    monkeypatch.setattr(torch.distributed, "all_to_all_single", recorded("send", send))
    wait = exchange.PendingTransfer.wait
    monkeypatch.setattr(exchange.PendingTransfer, "wait", recorded("wait", wait))
    return calls


def rank_main(rank: int, store: str) -> None:
    init_method = f"file://{store}"
    torch.distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare_with_serial(record_exchange(monkeypatch))
        monkeypatch.setattr(exchange, "_ROUND_ELEMENTS", 400)
        compare_with_serial(None)
    torch.distributed.destroy_process_group()


def compare_with_serial(calls: list[str] | None) -> None:
    """Three steps; both optimizers send before the first of them waits."""
    whole = [whole_parameters(shapes, 0) for shapes in (DENSE, EXPERTS)]
    serial = [Muon(params, lr=0.1) for params in whole]
    copies = [ShardedCopy(params, seed) for seed, params in enumerate(whole)]
    owned = own_matrices(copies[0].stacks, copies[1].stacks, [0, 1], [0, 1])
    for copy, assignment in zip(copies, owned, strict=True):
        copy.place(assignment)
    coordinator = MuonCoordinator([copy.muon for copy in copies])
    for step in range(3):
        for params, optimizer, copy in zip(whole, serial, copies, strict=True):
            set_gradients(params, step)
            optimizer.step()
            copy.set_gradients()
        coordinator.start_steps()
        for copy in copies:
            copy.muon.step()
    if calls is not None:
        assert calls == 3 * ["send", "send", *(2 * ["wait", "send", "wait"])]
    for params, copy in zip(whole, copies, strict=True):
        for number, (param, shard) in enumerate(zip(params, copy.shards, strict=True)):
            expected = copy.part(param, number)
            torch.testing.assert_close(shard.detach(), expected, rtol=0, atol=2e-6)


@pytest.mark.distributed
def test_sharded_steps_equal_serial(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        rank_main, (str(tmp_path / "store"),), nprocs=2, start_method="fork"
    )


def test_a_shard_without_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sent: the other ranks would wait for it."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    (param,) = whole_parameters(DENSE[1:2], 0)
    stack = make_stack(param, param.shape, [(Shard(0, 0, 100), Shard(1, 100, 480))])
    assignment = Assignment(list_matrices([stack]), [1], np.zeros(2))
    optimizer = Muon([param])
    optimizer.place([MatrixPlacement([stack], [param], assignment, torch.device("cpu"))])
    with pytest.raises(ValueError, match=r"1 x \(20, 24\) is divided over ranks and has no grad"):
        optimizer.step()
