"""Owners and pieces against counting element by element; Trinity Large on 2048 ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from trinity_megatron.model.presets import get_preset, trinity_preset
from trinity_megatron.optimizer.sharded.buffer_layout import (
    aligned_expert_buffers,
    matrix_aligned_layout,
    shard_bounds,
)
from trinity_megatron.optimizer.sharded.ownership import (
    Piece,
    Shard,
    Stack,
    hold_matrices,
    list_matrices,
    newton_schulz_flops,
    own_matrices,
    relieve,
)
from trinity_megatron.planner.muon_work import MuonPlan, even_stages, plan_muon, stage_parameters

LARGE_FLOPS = 3.65e16  # of a step, over all matrices of Large


def cut(numel: int, ranks: list[int], seed: int) -> tuple[Shard, ...]:
    """Any cut: also inside rows, and shards with nothing."""
    inner = torch.randint(0, numel + 1, (len(ranks) - 1,), generator=torch.manual_seed(seed))
    bounds = [0, *sorted(inner.tolist()), numel]
    return tuple(Shard(r, a, b) for r, a, b in zip(ranks, bounds, bounds[1:], strict=False))


def stacks(seed: int) -> list[Stack]:
    """Fused, stacked, divided by rows and by columns, copied; over two TP ranks of three shards."""
    found = []
    for count, rows, columns, sizes, dim in (
        (1, 28, 5, (6, 6, 1, 1), 0),
        (3, 8, 6, (4, 4), None),
        (3, 6, 4, (6,), 1),
        (1, 3, 7, (3,), None),
    ):
        parts = [
            cut(count * rows * columns, [3 * t, 3 * t + 1, 3 * t + 2], seed + t) for t in range(2)
        ]
        found.append(Stack(count, rows, columns, sizes, dim, tuple(parts)))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_the_elements_of_a_matrix(seed: int) -> None:
    for stack in stacks(10 * seed):
        flat = np.arange(stack.numel).reshape(stack.count, -1, sum(stack.sizes), stack.columns)
        for expert in range(stack.count):
            first = 0
            for block, size in enumerate(stack.sizes):
                expected = flat[expert, :, first : first + size].ravel()
                first += size
                copies = stack.copies(expert, block)
                assert len(copies) == (2 if stack.shard_dim is None else 1)
                pieces = [piece for copy in copies for piece in copy]
                for part in range(2):
                    seen: list[int] = []
                    for piece in (p for p in pieces if p.part == part):
                        (shard,) = [s for s in stack.holders[part] if s.rank == piece.rank]
                        for start, stop in stack.intervals(expert, block, piece):
                            assert shard.start <= start < stop <= shard.stop
                            seen += range(start, stop)
                    assert seen == expected.tolist()


def test_everything_is_owned_once_and_by_a_holder_if_alone() -> None:
    held = hold_matrices(list_matrices(stacks(1)), 6)
    assert len(held.owners) == len(held.matrices) == 4 + 6 + 3 + 1
    for matrix, owner in zip(held.matrices, held.owners, strict=True):
        assert owner in {piece.rank for piece in matrix.pieces}
    assert held.loads.sum() == pytest.approx(sum(m.cost for m in held.matrices))


def test_a_rank_with_dense_work_gives_experts_away() -> None:
    whole = (Shard(0, 0, 8 * 64 * 64),), (Shard(1, 0, 8 * 64 * 64),)
    experts = [Stack(8, 64, 64, (64,), None, (holders,)) for holders in whole]
    dense = [Stack(1, 64, 256, (64,), None, ((Shard(0, 0, 64 * 256),),))]
    of_dense, of_experts = own_matrices(dense, experts, [0, 1], [0, 1])
    assert of_experts.loads.sum() == pytest.approx(
        16 * newton_schulz_flops(64, 64) + newton_schulz_flops(64, 256)
    )
    assert of_experts.loads.max() <= 1.1 * of_experts.loads.mean()
    # Where it is balanced, nothing moves.
    untouched = own_matrices([], experts, [0, 1], [0, 1])[1]
    assert untouched.owners == [0] * 8 + [1] * 8


@pytest.mark.parametrize("bucket_size", [None, 3 * 96, 40 * 96])
def test_shards_of_experts_are_whole_matrices(bucket_size: int | None) -> None:
    matrix = 64
    params = [torch.empty(n, 8, 8) for _ in range(5) for n in (4, 8)]
    layout = matrix_aligned_layout(params, matrix, bucket_size, ranks=4)
    assert layout is not None
    ends = set()
    for param, (start, stop, bucket) in layout.param_index_map.items():
        first, last = layout.bucket_indices[bucket]
        assert first <= start and stop <= last and stop - start == param.numel()
        assert (last - first) % (4 * matrix) == 0 and (start - first) % matrix == 0
        for shards in shard_bounds(start, param.numel(), (first, last), [[0, 1, 2, 3]]):
            assert sum(s.stop - s.start for s in shards) == param.numel()
            ends |= {s.stop % matrix for s in shards}
    assert ends == {0}
    # 60 matrices on 50 ranks would be two on some and padding on most.
    assert matrix_aligned_layout(params, matrix, bucket_size, ranks=50) is None


def test_the_layout_of_megatron_comes_back() -> None:
    before = DistributedOptimizer._compute_per_buffer_param_layout
    with aligned_expert_buffers():
        assert DistributedOptimizer._compute_per_buffer_param_layout is not before
    assert DistributedOptimizer._compute_per_buffer_param_layout is before


@pytest.mark.parametrize("pipeline", [1, 8])
def test_large_on_2048_ranks(pipeline: int) -> None:
    plan = plan_large(pipeline)
    print(plan)
    assert plan.flops.sum() == pytest.approx(LARGE_FLOPS, rel=1e-3)
    assert plan.balance <= 1.05
    config = trinity_preset("large")
    vocab = get_preset("large").model["vocab_size"]
    adam = 2 * vocab * config.hidden_size + config.num_layers * (4 * 3072 + 2 * 128) + 3072
    muon = config.num_parameters() - adam
    assert plan.mean_state_bytes == pytest.approx((8 * muon + 12 * adam) / 2048, rel=1e-6)
    # Each rank holds its share of its stage, up to one expert matrix.
    per_stage = 2048 // pipeline
    for number in range(pipeline):
        stage = plan.state_bytes[number * per_stage : (number + 1) * per_stage]
        assert stage.max() <= 1.05 * stage.mean()
    # Little travels: a rank holds and orthogonalizes some 20 matrices of 19 MB.
    assert plan.sent_bytes.mean() < (0.1 if pipeline == 1 else 0.25) * 20 * 2 * 3072**2 * 2


def plan_large(pipeline: int) -> MuonPlan:
    config = trinity_preset("large")
    return plan_muon(
        config,
        get_preset("large").model["vocab_size"],
        world_size=2048,
        expert_parallel=8,
        stages=even_stages(config.num_layers, pipeline),
    )


def test_stages_take_all_layers_in_order() -> None:
    for count in (1, 3, 8):
        layers = [layer for stage in even_stages(60, count) for layer in stage]
        assert layers == list(range(60))
    assert [len(stage) for stage in even_stages(60, 8)] == [7, 7, 8, 8, 8, 8, 7, 7]
    with pytest.raises(ValueError, match="world_size=10"):
        plan_muon(trinity_preset("tiny"), 64, world_size=10, stages=even_stages(4, 4))


def test_the_plan_has_the_parameters_of_the_model(build: Callable[..., Any]) -> None:
    model = build()
    planned = stage_parameters(
        model.config, model.config.vocab_size, range(model.config.num_layers), True, True, 1
    )
    # In this order: it decides on the layout of the buffers.  Norms are AdamW's.
    of_plan = [(name, tuple(p.shape)) for name, p in planned if p.dim() > 1]
    of_model = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.dim() > 1]
    assert of_plan == of_model


def test_a_piece_counts_its_elements() -> None:
    assert Piece(0, 0, 3, 10).numel == 7


def replicated(replicas: int, ranks: int) -> list[Stack]:
    """A stack of 2 * ranks matrices, two on every rank of each replica; ranks follow each other."""
    size = 2 * 4 * 6
    holders = tuple(
        tuple(Shard(first * ranks + n, n * size, (n + 1) * size) for n in range(ranks))
        for first in range(replicas)
    )
    return [Stack(2 * ranks, 4, 6, (4,), None, holders)]


def test_replicas_share_what_they_hold() -> None:
    held = hold_matrices(list_matrices(replicated(2, 3)), 6)
    assert sorted(held.owners) == [0, 1, 2, 3, 4, 5]
    for matrix, owner in zip(held.matrices, held.owners, strict=True):
        assert owner in matrix.whole_on() and len(matrix.whole_on()) == 2
        assert {piece.rank for piece in matrix.copy_for(owner, 6)} == {owner}


def test_a_stranger_gets_the_copy_of_its_replica() -> None:
    (matrix, *_) = list_matrices(replicated(2, 3))
    assert {piece.rank for piece in matrix.copy_for(1, 6)} == {0}
    assert {piece.rank for piece in matrix.copy_for(5, 6)} == {3}


def test_what_stays_moves_among_its_holders_only() -> None:
    held = hold_matrices(list_matrices(replicated(2, 3)), 6)
    base = np.array([10.0, 0, 0, 0, 0, 0]) * held.matrices[0].cost
    moved = relieve(held, base, stay=True)
    for matrix, owner in zip(moved.matrices, moved.owners, strict=True):
        assert owner in matrix.whole_on()
    assert 0 not in moved.owners  # all of it is with the other holder, rank 3
    assert relieve(held, base).owners != moved.owners
