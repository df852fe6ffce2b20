"""--log-straggler: the rank that the others wait for is named; where none is slow, nobody is."""

from pathlib import Path

import pytest

from tests.functional_tests.launch import Job, Logs, train
from trinity_megatron.telemetry.straggler_rule import WINDOW
from trinity_megatron.telemetry.tensorboard_log import STRAGGLER_TAG, RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS, SLOW, INTERVAL = 4, 2, 10
FLAGS = (
    "--num-layers 2 --micro-batch-size 2 --expert-model-parallel-size 2 "
    f"--use-distributed-optimizer --log-straggler --log-interval {INTERVAL}"
)
STEPS, SLOW_STEPS = 3 * WINDOW, 2 * WINDOW


@pytest.fixture(scope="module")
def logs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Logs:
    folder = tmp_path_factory.mktemp("straggler")
    slow = {"rank": SLOW, "share": 0.3, "until": SLOW_STEPS}
    jobs = [
        Job("slow", f"{FLAGS} --train-iters {STEPS}", probe={"slow": slow}),
        Job("even", f"{FLAGS} --train-iters {STEPS}"),
    ]
    logs = train(data, folder, [(RANKS, jobs)])
    print((folder / "log").read_text())
    return logs


def said(log: RunLog) -> dict[int, str]:
    texts = log.tensors(f"{STRAGGLER_TAG}/text_summary")
    return {step: text.reshape(-1)[0].decode() for step, text in texts.items()}


def test_a_slow_rank_is_named(logs: Logs) -> None:
    print(said(logs["slow"]), logs["slow"].scalars("speed/slowest_rank_ratio"))
    print(logs["even"].scalars("speed/slowest_rank_ratio"))
