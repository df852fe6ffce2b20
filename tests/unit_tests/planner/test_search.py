"""The search over layouts."""

from dataclasses import replace

import pytest

from tests.functional_tests.launch import TAKES_ALL
from trinity_megatron.errors import UserError
from trinity_megatron.planner.hardware import get_gpu
from trinity_megatron.planner.kernels.tables import load_rates
from trinity_megatron.planner.layout import Layout, check_layout
from trinity_megatron.planner.model_description import describe_model
from trinity_megatron.planner.plan import Budget, Plan
from trinity_megatron.planner.request import report_layout
from trinity_megatron.planner.search import search_layouts


def start(name: str, gpu: str, gpus: int, batch: int, length: int = 4096) -> Plan:
    layout = Layout(
        world_size=gpus, global_batch_size=batch, seq_length=length, transformer_impl="local"
    )
    model = describe_model(name)
    return Plan(model, layout, load_rates(get_gpu(gpu), own=True), model.optimizer, Budget(17e12))


def test_search_finds_the_fastest_that_fits() -> None:
    search = search_layouts(start("mini", "h100", 64, 1024), micro_batches=(1, 2))
    best = search.best[0]
    assert all(plan.fits for plan in search.best)
    rates = [plan.time.tokens_per_second_per_gpu for plan in search.best]
    assert rates == sorted(rates, reverse=True) and len(rates) == 5
    assert search.families[0].best is best and search.families[0].reason == ""
    for family in search.families[1:]:
        assert family.reason.startswith("does not fit") is not family.best.fits
        assert not family.best.fits or family.best.time.seconds >= best.time.seconds
    check_layout(best.model, best.layout)
    # A neighbour that was not better: the search would have taken it.
    with_other = replace(best, layout=replace(best.layout, recompute="full"))
    assert with_other.time.seconds > best.time.seconds


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="fits under no layout.*Remedy: more GPUs"):
        search_layouts(start("large", "h100", 8, 64), micro_batches=(1,))


@pytest.mark.skipif(not TAKES_ALL, reason="takes 10 s; TRINITY_TESTS=all")
def test_large_on_2048_b300() -> None:
    search = search_layouts(start("large", "b300", 2048, 12288, 8192))
    best = search.best[0]
    assert sum(best.fullest.needed) / 2 < 268.6 * 2**30
    beside = report_layout(best)
    assert beside is not None and beside.fits
    assert (beside.layout.shard_size, beside.layout.expert_model_parallel_size) == (128, 8)
    assert best.days is not None and 8 < best.days < 20
    assert beside.days is not None and best.days < beside.days < 40
