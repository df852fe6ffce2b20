"""Trainings on conversations: resumed, cut over ranks, and with the expert bias held still."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.functional_tests.launch import Job, train
from trinity_megatron.data.chat.prepare import prepare_chat
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WHOLE = "--train-iters 8 --micro-batch-size 1 --global-batch-size 4"
HALF = f"{WHOLE} --exit-interval 4 --save-interval 4"


@pytest.fixture(scope="module")
def conversations(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums, in up to three turns; 64 tokens hold one of the longest or a few short ones."""
    folder = tmp_path_factory.mktemp("chat")
    draw, rows = random.Random(0), []
    for _ in range(60):
        messages = []
        for _ in range(draw.randint(1, 3)):
            a, b = draw.randint(0, 9), draw.randint(0, 9)
            messages += [
                {"role": "user", "content": f"{a} + {b}?"},
                {"role": "assistant", "content": str(a + b)},
            ]
        rows.append(json.dumps({"messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    prepare_chat(folder / "chat", [folder / "rows.jsonl"], tokenizer=data / "tokenizer")
    return folder / "chat"


@pytest.fixture(scope="module")
def runs(conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("runs")
    half = folder / "half_checkpoints"
    one = [
        Job("whole", WHOLE),
        Job("half", HALF, half),
        Job("frozen", f"{WHOLE} --moe-router-bias-freeze-step 0"),
    ]
    two = [
        Job("tp2", f"{WHOLE} --tensor-model-parallel-size 2 --sequence-parallel"),
        Job("ep2", f"{WHOLE} --expert-model-parallel-size 2"),
    ]
    logs = train(conversations, folder, [(1, one), (2, two)])
    logs.update(train(conversations, folder, [(1, [Job("half", WHOLE, half)])]))
    return SimpleNamespace(logs=logs)


def test_a_resumed_run_equals_the_whole_one_bit_for_bit(runs: SimpleNamespace) -> None:
    whole, resumed = runs.logs["whole"], runs.logs["half"]
    for tag in ("lm loss", "grad-norm"):
        assert list(whole.scalars(tag)) == list(range(1, 9))
        assert resumed.scalars(tag) == whole.scalars(tag)
    losses = list(whole.scalars("lm loss").values())
    assert losses[-1] < losses[0] - 0.5  # it learns


@pytest.mark.parametrize("layout", ["tp2", "ep2"])
def test_ranks_read_the_same_conversations(layout: str, runs: SimpleNamespace) -> None:
    """In fp32: the first step's loss to rounding, later ones to what routing makes of it."""
    whole, other = (runs.logs[name].scalars("lm loss") for name in ("whole", layout))
    assert other[1] == pytest.approx(whole[1], abs=2e-5)
    assert max(abs(other[step] - whole[step]) for step in whole) < 1e-2


def test_the_expert_bias_moves_or_is_held(runs: SimpleNamespace) -> None:
    def moved(log: RunLog) -> float:
        return max(float(np.abs(values).max()) for values in log.tensors(BIAS_TAG).values())

    assert moved(runs.logs["whole"]) > 0
    assert moved(runs.logs["frozen"]) == 0
