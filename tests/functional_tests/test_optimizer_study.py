"""The optimizer study: steps to a loss, an equal search, and no run that is trained twice."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.functional_tests.launch import ROOT, TAKES_ALL, environment, load_of_study

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STUDY = ROOT / "examples" / "optimizer_study"
# Nothing moves: neither optimizer has a learning rate that fp32 weights notice, no rule the bias.
STILL = (
    "--muon-recipes 1e-30:1e-30:0:0.9:0.9 --adam-recipes 1e-30:1e-30:0:0.9 "
    "--moe-router-bias-update-rule none --seeds 2 --steps 2 --search-steps 2 --eval-interval 1 "
    "--eval-iters 2 --num-layers 2 --seq-length 64 --window-size 15,0 --global-batch-size 2 "
    "--micro-batch-size 2"
).split()


def start(out: Path, data: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the command."""
    command = [sys.executable, str(STUDY / "run.py"), "--out", str(out), "--data", str(data)]
    command += [*STILL, *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not TAKES_ALL:
        pytest.skip("six starts: a part of make test-all")
    out = tmp_path_factory.mktemp("study") / "out"
    result = start(out, data)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The module of the study that condenses."""
    return load_of_study("optimizer_study", "results")


def test_every_evaluation_reads_the_same_text(study: Path) -> None:
    runs = json.loads((study / "results.json").read_text())["runs"]
    assert sum(run["phase"] == "search" for run in runs) == 2
    runs = [run for run in runs if run["phase"] == "final"]
    assert sorted((run["optimizer"], run["seed"]) for run in runs) == [
        ("adam", 1),
        ("adam", 2),
        ("muon", 1),
        ("muon", 2),
    ]
    by_seed = {
        seed: {loss for run in runs if run["seed"] == seed for loss in run["validation_loss"]}
        for seed in (1, 2)
    }
    # The weights stand still, and the training data go on: only other text would change the loss.
    assert [len(losses) for losses in by_seed.values()] == [1, 1]
    assert by_seed[1] != by_seed[2]  # other initial weights
    assert all(run["steps"] == [1, 2] for run in runs)


def test_a_run_of_the_search_is_not_trained_again_if_it_is_as_long(study: Path) -> None:
    for optimizer in ("muon", "adam"):
        (search,) = (study / "search" / optimizer).glob("*/seed_1/tensorboard/events.*")
        for phase in ("shortlist", "final"):
            (later,) = (study / phase / optimizer).glob("*/seed_1/tensorboard/events.*")
            assert later.name == search.name and later.read_bytes() == search.read_bytes()


def test_a_complete_run_is_not_trained_again(study: Path, data: Path) -> None:
    files = [*sorted(study.glob("*/*/*/seed_*/tensorboard/events.*")), study / "results.md"]
    before = [(file, file.read_bytes()) for file in files]
    (study / "optimizer_study.png").unlink()
    again = start(study, data)
    assert again.returncode == 0, again.stderr
    assert "AdamW" in again.stdout and "to go" not in again.stdout
    files = [*sorted(study.glob("*/*/*/seed_*/tensorboard/events.*")), study / "results.md"]
    assert [(file, file.read_bytes()) for file in files] == before
    assert (study / "optimizer_study.png").read_bytes().startswith(b"\x89PNG")
    other = start(study, data, "--weight-decay", "0.2")
    assert other.returncode == 2 and "other flags" in other.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--adam-recipes 1e-2:1e-2:0:0.9 2e-2:1e-2:0:0.9", "as many for one as for the other"),
        ("--adam-recipes 1e-2:1e-2", "is no LR:DECOUPLED_LR:WARMUP:BETA1"),
        ("--muon-recipes 1e-2:1e-2:0:0.9", "is no LR:DECOUPLED_LR:WARMUP:BETA1:MOMENTUM"),
        ("--steps 2 --search-steps 4", "--search-steps 4 is above --steps 2"),
        ("--steps 7 --eval-interval 3", "no multiple of --eval-interval 3"),
    ],
)
def test_refused_before_anything_is_trained(
    flags: str, message: str, tmp_path: Path, data: Path
) -> None:
    refused = start(tmp_path, data, *flags.split())
    assert refused.returncode == 2 and message in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ((8.0, 6.0, 4.0, 3.0), 4.0, 30.0),  # at an evaluation
        ((8.0, 6.0, 4.0, 3.0), 4.5, 27.5),  # between two
        ((8.0, 6.0, 4.0, 3.0), 9.0, 10.0),  # before the first
        ((8.0, 6.0, 4.0, 3.0), 2.9, math.nan),  # never
        ((8.0, 5.0, 7.0, 3.0), 5.5, 10 + 10 * 2.5 / 3),  # up again later: the first time counts
        ((8.0, 6.0, 7.0, 3.0), 5.0, 35.0),  # the line from the evaluation just before
        ((8.0, 6.0, 6.0, 6.0), 6.0, 20.0),  # level
    ],
)
def test_steps_to_reach(
    losses: Sequence[float], target: float, expected: float, results: ModuleType
) -> None:
    steps = results.steps_to_reach(np.array([10, 20, 30, 40]), np.array(losses), target)
    assert steps == pytest.approx(expected, rel=1e-12, nan_ok=True)


def make_run(results: ModuleType, optimizer: str, seed: int, losses: Sequence[float]) -> Any:
    steps = np.arange(1, len(losses) + 1) * 10
    recipe = results.Recipe(1e-2, 1e-2, 0, 0.9)
    return results.Run("final", optimizer, recipe, seed, steps, np.array(losses))


def test_compare(results: ModuleType) -> None:
    adam = [make_run(results, "adam", 1, (7, 5, 5, 4)), make_run(results, "adam", 2, (9, 7, 5, 4))]
    muon = [make_run(results, "muon", 1, (6, 4, 3, 3)), make_run(results, "muon", 2, (8, 6, 2, 2))]
    half, end = (results.compare(adam, muon, share) for share in (0.5, 1.0))
    assert (half.loss, half.adam_steps, half.muon_steps) == (6.0, 20.0, 15.0)
    assert half.seed_steps == {1: 10.0, 2: 20.0}
    assert (end.loss, end.adam_steps, end.muon_steps) == (4.0, 40.0, 20 + 10 * 1 / 2.5)
    assert end.seed_ratios == {1: 0.5, 2: 25 / 40}
    # An AdamW that has its final loss before the end is not credited with the steps after it.
    early = results.compare([make_run(results, "adam", 1, (7, 4, 5, 4))], muon, 1.0)
    assert early.adam_steps == 20.0


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([(6, 4, 3, 3), (8, 6, 2, 2)], "Muon needs 0.56 of them (0.50, 0.62); at most 0.7 holds."),
        ([(6, 4, 3, 3), (8, 6, 5, 3)], "holds on average, not in every seed"),
        ([(6, 5, 5, 4), (8, 6, 5, 3)], "does not hold"),
        ([(6, 4, 3, 3), (8, 6, 5, 5)], "not every seed of Muon reaches it"),
    ],
)
def test_statement(
    losses: Sequence[Sequence[float]], verdict: str, results: ModuleType, tmp_path: Path
) -> None:
    runs = [make_run(results, "muon", seed, values) for seed, values in enumerate(losses, 1)]
    runs += [make_run(results, "adam", seed, (8, 6, 5, 4)) for seed in (1, 2)]
    runs += [
        dataclasses.replace(run, phase=phase)
        for run in runs
        if run.seed == 1
        for phase in ("search", "shortlist")
    ]
    text = results.write_results(runs, tmp_path, settings={})
    assert verdict in text
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["statement"] in text
    ends = [values[-1] for values in losses]
    assert (content["comparisons"][-1]["seed_ratios"]["2"] is None) == (ends[1] > 4)


def make_phase(results: ModuleType, phase: str, losses: dict[float, float]) -> list[Any]:
    """Runs of AdamW on one seed: the loss at the end for each learning rate."""
    steps = np.array([10])
    return [
        results.Run(phase, "adam", results.Recipe(lr, 1e-2, 0, 0.9), 1, steps, np.array([loss]))
        for lr, loss in losses.items()
    ]


@pytest.mark.parametrize(("best", "is_edge"), [(1e-3, True), (2e-3, False), (4e-3, True)])
def test_a_best_rate_at_the_edge_is_refused(
    best: float, is_edge: bool, results: ModuleType
) -> None:
    losses = {1e-3: 4.0, 2e-3: 4.1, 4e-3: 4.2, best: 3.0}
    runs = make_phase(results, "search", losses)
    if is_edge:
        with pytest.raises(ValueError, match="at the edge .* --adam-recipes"):
            results.find_shortlist(runs, "adam", 2)
    else:
        listed = results.find_shortlist(runs, "adam", 2)
        assert [run.recipe.lr for run in listed] == [2e-3, 1e-3]


def test_the_best_of_the_shortlist_is_that_of_its_longer_runs(results: ModuleType) -> None:
    search = make_phase(results, "search", {1e-3: 4.0, 2e-3: 3.0, 4e-3: 3.1, 8e-3: 3.2})
    shortlist = make_phase(results, "shortlist", {2e-3: 2.5, 4e-3: 2.4})
    assert results.find_best([*search, *shortlist], "adam").recipe.lr == 4e-3
    shortlist = make_phase(results, "shortlist", {2e-3: 2.5, 8e-3: 2.4})
    with pytest.raises(ValueError, match="at the edge"):
        results.find_best([*search, *shortlist], "adam")
    with pytest.raises(ValueError, match="no shortlist of AdamW"):  # of a study before it had one
        results.find_best(search, "adam")
