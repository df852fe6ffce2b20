"""Cross entropy over a vocabulary that is split over ranks.

The ranks come from a server of processes: where a test before this one has started autograd's
threads, a fork of this process could run no backward pass.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.functional_tests.launch import TAKES_ALL
from tests.unit_tests.model.loss_cases import INTERPRETED
from trinity_megatron.model.cross_entropy import vocab_parallel_cross_entropy
from trinity_megatron.model.lm_head_loss import z_loss
from trinity_megatron.model.logit_statistics import LogitStatistics

WORLD = 4
COEFF = 1e-2
# Of the largest entry: some ten roundings of fp32 (6e-8 each).
TOLERANCE = 1e-6


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).abs().max()
    assert error <= TOLERANCE * expected.abs().max(), f"{error=} of {expected.abs().max()}"


def make_case(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits ``[s, b, v]``, targets and mask ``[s, b]``, the same on each rank."""
    generator = torch.Generator().manual_seed(3)
    s, b, v = (1, 1, 12) if name == "one token" else (6, 2, 52)
    logits = 3 * torch.randn(s, b, v, generator=generator)
    # Each slice of each layout holds a target.
    target = (torch.arange(s * b) * 13 % v).view(s, b)
    mask = torch.ones(s, b)
    mask[-1, 0] = s == 1
    if name == "large logits":
        logits *= 3e3
    if name == "outlier on one rank":
        logits[0, 0, -1] = 1e4
        logits[1, 1, target[1, 1]] = -1e4
        logits[2, :, :13] = -1e4  # nothing of weight on the first rank
    return logits, target, mask


def check_case(name: str, part: str, group: dist.ProcessGroup, calls: list[Any]) -> None:
    values, target, mask = make_case(name)
    exact = values.double().requires_grad_()
    exact_logsumexp = exact.logsumexp(dim=-1)
    exact_loss = exact_logsumexp - exact.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    leaf = values.chunk(size, dim=-1)[rank].clone().requires_grad_()
    calls.clear()
    loss, logsumexp, statistics = vocab_parallel_cross_entropy(
        leaf.clone(),
        target,
        tp_group=group,
        overwrite_logits=True,
        collect_statistics=True,
        loss_mask=mask,
    )
    for each, lse in ((loss, logsumexp), (exact_loss, exact_logsumexp)):
        (mask * (each if part == "loss" else z_loss(lse, COEFF))).mean().backward()
    expected_calls = [] if size == 1 else [dist.ReduceOp.MAX, dist.ReduceOp.SUM]
    assert calls == expected_calls
    assert_near(loss, exact_loss)
    assert_near(logsumexp, exact_logsumexp)
    # Relative to the largest entry of the whole vocabulary.
    error = (leaf.grad - exact.grad.chunk(size, dim=-1)[rank]).abs().max()
    assert error <= TOLERANCE * exact.grad.abs().max(), (name, part, size, rank, error)
    assert statistics is not None
    check_statistics(statistics, values.double()[mask.bool()])


def check_statistics(statistics: LogitStatistics, kept: torch.Tensor) -> None:
    """Every rank has the numbers of the whole vocabulary."""
    logsumexp = kept.logsumexp(dim=-1)
    for found, values in zip(statistics, (kept, logsumexp, logsumexp.square()), strict=True):
        assert found.count == values.numel()
        assert abs(found.total - values.sum()) <= TOLERANCE * values.abs().sum()
        torch.testing.assert_close(found.maximum.double(), values.max(), rtol=1e-6, atol=0)


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    calls: list[Any] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, op: Any, group: Any) -> Any:
        calls.append(op)
        return all_reduce(tensor, op=op, group=group)

    dist.all_reduce = counted
    if INTERPRETED:
        from trinity_megatron.model import logit_kernels

        logit_kernels.BLOCK = 16  # two blocks of a slice, the second one short
    for size in (2,) if INTERPRETED and not TAKES_ALL else (1, 2, 4):
        group, _ = dist.new_subgroups(size)
        for name in ("ordinary", "one token", "large logits", "outlier on one rank"):
            for part in ("loss", "z-loss"):
                check_case(name, part, group, calls)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_split_vocabulary(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        run_rank, (str(tmp_path / "store"),), nprocs=WORLD, start_method="forkserver"
    )
