"""Rank 0 of a world of 8 and of 2048 on the null device, as each generation of GPUs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional_tests.launch import only_in_all
from tests.null_gpu.conftest import Result

pytestmark = [pytest.mark.null_gpu, pytest.mark.slow]

FLAGS = (
    "--fake-process-group --preset tiny --train-iters 3 --eval-iters 0 --micro-batch-size 1 "
    "--log-interval 100"
)
EP8 = "--expert-model-parallel-size 8 --use-distributed-optimizer"
PP2_EP16 = (
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 16 --use-distributed-optimizer"
)
WORLDS = [
    pytest.param(100, 8, EP8, 5, id="sm_100-8"),
    pytest.param(90, 8, EP8, 5, id="sm_90-8", marks=only_in_all),
    pytest.param(103, 2048, PP2_EP16, 10, id="sm_103-2048", marks=only_in_all),
]


@pytest.mark.parametrize(("capability", "ranks", "layout", "most_waits"), WORLDS)
def test_rank_0_of_a_world(
    capability: int,
    ranks: int,
    layout: str,
    most_waits: int,
    rehearse: Callable[..., Result],
    data: Path,
) -> None:
    flags = f"{FLAGS} {layout} --global-batch-size {ranks}".split()
    result = rehearse(
        *flags, "--data", str(data), WORLD_SIZE=str(ranks), NULL_GPU_CAPABILITY=str(capability)
    )
    assert result.code == 0, result.output[-3000:]
    first, second, third = result.steps
    assert third["graphs"] == second["graphs"]  # nothing is compiled again
    assert third["startup_peak"] <= third["peak"]
    waits = second["waits"]
    # As without a world; several stages ask each other at the end of a step.
    assert sum(waits.values()) <= most_waits, waits
    assert not any("experts" in where for where in waits), waits
    # Objects that all ranks send to all: a start has few and small ones, a step none.
    gathers = [
        call
        for call in first["startup_collectives"]
        if call["name"] == "all_gather_object" and call["ranks"] == ranks
    ]
    assert 0 < len(gathers) <= 3
    assert all(call["bytes"] <= 256 * call["calls"] for call in gathers), gathers
    assert not any("object" in call["name"] for call in second["collectives"])
