"""--log-straggler: the rank that the others wait for is named; where none is slow, nobody is."""

import socket
from pathlib import Path

import pytest

from tests.functional_tests.launch import Job, Logs, train
from trinity_megatron.report.report import write_report
from trinity_megatron.telemetry.straggler_rule import STRAGGLER_RATIO, WINDOW
from trinity_megatron.telemetry.tensorboard_log import STRAGGLER_TAG, RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS, SLOW = 4, 2
# All kinds of waits in a step: the experts' exchange, reduced gradients, gathered weights.
FLAGS = (
    "--num-layers 2 --micro-batch-size 2 --expert-model-parallel-size 2 "
    f"--use-distributed-optimizer --log-straggler --log-interval {WINDOW // 2}"
)


@pytest.fixture(scope="module")
def logs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Logs:
    """Slow for a window, then for another one not; and three windows in which no rank is."""
    slow = {"rank": SLOW, "share": 0.3, "until": WINDOW}
    jobs = [
        Job("slow", f"{FLAGS} --train-iters {2 * WINDOW}", probe={"slow": slow}),
        Job("even", f"{FLAGS} --train-iters {3 * WINDOW}"),
    ]
    return train(data, tmp_path_factory.mktemp("straggler"), [(RANKS, jobs)])


def said(log: RunLog) -> dict[int, str]:
    texts = log.tensors(f"{STRAGGLER_TAG}/text_summary")
    return {step: text.reshape(-1)[0].decode() for step, text in texts.items()}


def test_a_slow_rank_is_named(logs: Logs) -> None:
    log = logs["slow"]
    (first, named), (last, recovered) = said(log).items()
    assert first == WINDOW, named
    name = f"straggler: rank {SLOW} (host {socket.gethostname()}"
    assert named.startswith(name) and "of the median of the other ranks over the last" in named
    assert log.scalars("speed/slowest_rank")[first] == SLOW
    assert log.scalars("speed/slowest_rank_ratio")[first] > STRAGGLER_RATIO
    assert WINDOW < last <= 2 * WINDOW  # when half of the window is new, or somewhat more
    assert recovered.startswith(name) and "is as fast as the other ranks again" in recovered


def test_where_none_is_slow_nobody_is_named(logs: Logs) -> None:
    ratios = logs["even"].scalars("speed/slowest_rank_ratio")
    assert said(logs["even"]) == {}, ratios
    assert list(ratios) == [20, 30, 40, 50, 60]


def test_the_report_names_it(logs: Logs, tmp_path: Path) -> None:
    report = write_report(logs["slow"], tmp_path, title="slow")
    page = report.page.read_text()
    for text in said(logs["slow"]).values():
        assert text in page
    assert "the slowest rank over the others" in page
