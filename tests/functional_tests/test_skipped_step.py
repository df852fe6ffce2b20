"""Steps that must not move the expert bias: skipped, recomputed, evaluated."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.functional_tests.launch import ADAM, Job, train
from trinity_megatron.model.moe.expert_bias import smebu_update
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SKIPPED = 6, 3
TOKENS_PER_LAYER = 8 * 64 * 4
FLAGS = f"--train-iters {STEPS}"
# Small scales: nothing overflows but what the test spoils.
FP16 = f"{' '.join(ADAM)} --fp16 --initial-loss-scale 4 --min-loss-scale 1 --hysteresis 1"
UNCHECKED = "--no-check-for-nan-in-loss-and-grad"
SHARDED = "--use-distributed-optimizer --expert-model-parallel-size 2"
SPOILED = ("fp16_nan", "fp16_inf", "muon_inf")
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("skipped")

    def spoiled(name: str, flags: str, value: float) -> Job:
        probe = {"record": str(folder / f"{name}.pt"), "spoil": {str(SKIPPED): value}}
        return Job(name, f"{FLAGS} {flags}", probe=probe)

    jobs = [
        # Megatron's loss scaler sees the NaN after the backward pass and skips the step.
        spoiled("fp16_nan", FP16, float("nan")),
        spoiled("fp16_inf", FP16, float("inf")),
        spoiled("muon_inf", UNCHECKED, float("inf")),
        Job("plain", FLAGS),
        Job("recompute", f"{FLAGS} {RECOMPUTE}"),
        Job("evaluated", f"{FLAGS} --eval-iters 2 --eval-interval 3"),
    ]
    # Two ranks with half of the experts each; the NaN is in the shard of one.
    sharded = spoiled("muon_sharded", f"{UNCHECKED} {SHARDED}", float("nan"))
    # The first step is skipped, and saved before AdamW has any state.
    first = {"spoil": {"1": float("nan")}}
    whole, saved = f"--train-iters 3 {UNCHECKED} {SHARDED}", folder / "first_saved"
    early = [
        Job("first_skipped", whole, probe=first),
        Job("first_saved", f"{whole} --exit-interval 1", checkpoints=saved, probe=first),
        Job("first_resumed", whole, checkpoints=saved),
    ]
    logs = train(data, folder, [(1, jobs), (2, [sharded, *early])])
    states = {name: torch.load(folder / f"{name}.pt") for name in (*SPOILED, "muon_sharded")}
    return SimpleNamespace(logs=logs, states=states)


def expected_after(state: dict[str, torch.Tensor]) -> Any:
    return smebu_update(
        state["expert_bias"],
        state["expert_bias_momentum"],
        state["local_tokens_per_expert"],
        update_rate=2e-3,
        momentum=0.5,
        clamp_scale=2.0,
    )


def test_a_save_before_the_first_update_resumes(runs: SimpleNamespace) -> None:
    losses = {
        name: runs.logs[name].scalars("lm loss") for name in ("first_skipped", "first_resumed")
    }
    assert list(losses["first_resumed"]) == [2, 3]
    assert losses["first_resumed"].items() <= losses["first_skipped"].items()


@pytest.mark.parametrize("name", SPOILED)
def test_a_skipped_step_moves_nothing(name: str, runs: SimpleNamespace) -> None:
    states = runs.states[name]
    assert len(states) == STEPS
    for step, (found, after) in enumerate(zip(states, states[1:], strict=False), start=1):
        # Not one token is left over from the step before.
        counts = found["local_tokens_per_expert"]
        assert (counts.sum(-1) == TOKENS_PER_LAYER).all(), step
        expected = (found["expert_bias"], found["expert_bias_momentum"])
        if step != SKIPPED:
            expected = expected_after(found)
            assert not torch.equal(expected[0], found["expert_bias"])
        assert torch.equal(after["weights"], found["weights"]) == (step == SKIPPED)
        # The same function on the same numbers: equal.
        assert torch.equal(after["expert_bias"], expected[0]), step
        assert torch.equal(after["expert_bias_momentum"], expected[1]), step
    logged = runs.logs[name].tensors(TOKENS_TAG)
    assert SKIPPED not in logged and len(logged) == STEPS - 1


def test_all_ranks_skip(runs: SimpleNamespace) -> None:
    states = runs.states["muon_sharded"]
    assert len(states) == STEPS
    for step, (found, after) in enumerate(zip(states, states[1:], strict=False), start=1):
        for name in ("weights", "expert_bias", "expert_bias_momentum"):
            assert torch.equal(after[name], found[name]) == (step == SKIPPED), (step, name)
    loss = runs.logs["muon_sharded"].scalars("lm loss")
    assert np.isfinite(list(loss.values())).all()


@pytest.mark.parametrize("name", ["recompute", "evaluated"])
def test_counted_once(name: str, runs: SimpleNamespace) -> None:
    plain, other = runs.logs["plain"], runs.logs[name]
    # The same operations in the same order, computed twice or between evaluations.
    assert other.scalars("lm loss") == plain.scalars("lm loss")
    for tag in (TOKENS_TAG, BIAS_TAG):
        a, b = plain.tensors(tag), other.tensors(tag)
        assert list(a) == list(b) == list(range(1, STEPS + 1))
        assert all(np.array_equal(a[step], b[step]) for step in a), tag
    assert bool(runs.logs["evaluated"].scalars("lm loss validation"))
