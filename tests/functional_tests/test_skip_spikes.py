"""--skip-spikes: after a poisoned batch the run equals one that never saw it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.functional_tests.launch import (
    ADAM,
    TAKES_ALL,
    Job,
    only_in_all,
    run_script,
    sampled,
    train,
)
from tests.functional_tests.test_resume import read_tensors
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, STOP, POISONED = 8, 6, (5, 6, 7)
# Two in a row; the run is saved after the second, and the third comes first after the resume.
SKIPPING = "--skip-spikes 8 --spike-window 8"
WHOLE = f"--train-iters {STEPS} --num-layers 2 {SKIPPING}"
SHARDED = "--use-distributed-optimizer --expert-model-parallel-size 2"
# Ranks and flags.
KINDS = sampled(
    {
        "muon": (4, SHARDED),
        "adam_alone": (1, f"{' '.join(ADAM)} --use-distributed-optimizer"),
        "adam": (4, f"{' '.join(ADAM)} {SHARDED}"),
        "muon_whole": (4, "--expert-model-parallel-size 4"),
        "overlapped": (4, f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"),
        "stages": (
            4,
            "--pipeline-model-parallel-size 2 --num-layers 4 --use-distributed-optimizer",
        ),
        "fsdp": (4, "--use-megatron-fsdp --expert-model-parallel-size 2"),
    },
    "muon",
    "adam_alone",
)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("spikes")
    saved = {name: folder / f"{name}_saved" for name in KINDS}
    never = {name: folder / f"{name}_never_saved" for name in KINDS}
    jobs: dict[int, list[Job]] = {1: [], 4: []}
    for name, (ranks, flags) in KINDS.items():
        poison = {"poison": POISONED}
        skipped = f"--iterations-to-skip {' '.join(map(str, POISONED))}"
        jobs[ranks] += [
            Job(f"{name}_half", f"{WHOLE} {flags} --exit-interval {STOP}", saved[name], poison),
            Job(name, f"{WHOLE} {flags}", saved[name], poison),
            Job(f"{name}_never", f"{WHOLE} {flags} {skipped}", never[name]),
        ]
    logs = train(data, folder, list(jobs.items()))
    return SimpleNamespace(logs=logs, saved=saved, never=never)


@pytest.mark.parametrize("name", KINDS)
def test_a_poisoned_batch_leaves_nothing(name: str, runs: SimpleNamespace) -> None:
    folder = f"iter_{STEPS:07d}"
    found, expected = (read_tensors(place[name] / folder) for place in (runs.saved, runs.never))
    assert any("bias_momentum" in key for key in found)
    assert any("momentum_buffer" in key or "exp_avg" in key for key in found)
    assert set(found) == set(expected)
    different = [key for key in found if not torch.equal(found[key], expected[key])]
    # Megatron counts samples that --iterations-to-skip leaves out; nothing else may differ.
    assert not different
    halves = runs.logs[f"{name}_half"], runs.logs[name]
    losses: dict[int, float] = {}
    for log in halves:
        losses |= log.scalars("lm loss")
    clean = runs.logs[f"{name}_never"].scalars("lm loss")
    assert set(losses) == set(clean) | set(POISONED)
    assert clean.items() <= losses.items()


@pytest.mark.parametrize("name", KINDS)
def test_skipped_steps_are_counted(name: str, runs: SimpleNamespace) -> None:
    half, rest = (runs.logs[job].scalars("train/skipped_steps") for job in (f"{name}_half", name))
    assert half == {step: max(0, step - POISONED[0] + 1) for step in range(1, STOP + 1)}
    assert rest == {step: 3 for step in range(STOP + 1, STEPS + 1)}
    for tag in (TOKENS_TAG, BIAS_TAG):
        assert not set(POISONED) & set(runs.logs[name].tensors(tag)), tag


def test_a_run_without_poison_is_not_changed(data: Path, tmp_path: Path) -> None:
    if not TAKES_ALL:
        pytest.skip("a part of make test-all")
    flags = "--train-iters 14 --num-layers 3"
    logs = train(data, tmp_path, [(1, [Job("plain", flags), Job("judged", f"{flags} {SKIPPING}")])])
    assert logs["plain"].scalars("lm loss") == logs["judged"].scalars("lm loss")


# The batches of steps 6 to 17 are bad in every start.
BROKEN = """
from tests.functional_tests.worker import poisoned
from trinity_megatron.training import pretrain

if __name__ == "__main__":  # the helper processes of a save import this module again
    with poisoned(list(range(6, 18))):
        pretrain.run()
"""


@only_in_all
def test_a_run_that_breaks_down_goes_back(data: Path, tmp_path: Path) -> None:
    flags = (*SKIPPING.split(), "--train-iters", "20", "--save-interval", "4", "--num-layers", "2")
    once, again = (run_script(BROKEN, data, tmp_path, *flags, "--rewind-on-spike") for _ in "12")
    assert once.returncode == 1 and again.returncode == 0, once.stderr + again.stderr
    decided = "the next start goes back to step 4 and passes over the batches up to step 15"
    assert "the last 10 steps up to step 15 were skipped" in once.stderr and decided in once.stderr
    assert "> the batches of steps 5 to 15 are passed over" in again.stdout
    assert "step 16 is skipped" in again.stdout and "step 18 is skipped" not in again.stdout
    never = tmp_path / "never"
    never.mkdir()
    passed_over = map(str, range(5, 18))
    plain = run_script(BROKEN, data, never, *flags, "--iterations-to-skip", *passed_over)
    assert plain.returncode == 0, plain.stderr
    found, expected = (
        read_tensors(folder / "run" / "checkpoints" / "iter_0000020")
        for folder in (tmp_path, never)
    )
    assert set(found) == set(expected)
    assert not [key for key in found if not torch.equal(found[key], expected[key])]
