"""A rank without model-parallel peers keeps its numbers; others reduce them."""

from types import SimpleNamespace

import torch
from megatron.training import training

from trinity_megatron.training.model_parallel_statistics import local_statistics
from trinity_megatron.upstream.registry import replaced

TARGETS = (
    "megatron.training.training:logical_and_across_model_parallel_group",
    "megatron.training.training:reduce_max_stat_across_model_parallel_group",
)


def test_only_a_group_of_one_is_left_out() -> None:
    asked: list[tuple[object, int]] = []

    def reduce(value: object, group: SimpleNamespace) -> str:
        asked.append((value, group.size()))
        return "reduced"

    one, two = (SimpleNamespace(size=lambda n=n: n) for n in (1, 2))
    with replaced(TARGETS[0], lambda _: reduce), replaced(TARGETS[1], lambda _: reduce):
        with local_statistics():
            logical_and = training.logical_and_across_model_parallel_group
            highest = training.reduce_max_stat_across_model_parallel_group
            assert logical_and(True, group=one) is True
            assert logical_and(False, group=one) is False
            assert highest(2.5, group=one) == 2.5
            assert highest(None, group=one) is None
            norm = highest(torch.tensor([2.5]), group=one)  # of Transformer Engine's kernels
            assert norm == 2.5 and isinstance(norm, float)
            assert asked == []
            assert logical_and(True, group=two) == highest(2.5, group=two) == "reduced"
    assert asked == [(True, 2), (2.5, 2)]
