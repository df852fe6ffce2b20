"""The buffer study: one command trains, draws and tabulates; its verdict follows the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.functional_tests.launch import ROOT, TAKES_ALL, environment, load_of_study
from trinity_megatron.telemetry.tensorboard_log import RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STUDY = ROOT / "examples" / "buffer_study"
ARMS = ("sequential", "rsdb")
SMALL = "--seeds 1 --steps 4 --seq-length 64 --global-batch-size 4 --num-layers 2"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The module of the study that condenses."""
    return load_of_study("buffer_study", "results")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    if not TAKES_ALL:
        pytest.skip("several starts: a part of make test-all")
    out = tmp_path_factory.mktemp("study") / "out"
    command = [sys.executable, str(STUDY / "run.py"), "--out", str(out), "--arms", *ARMS]
    result = subprocess.run(
        [*command, *SMALL.split()], env=environment(), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return SimpleNamespace(out=out, output=result.stdout)


def test_the_table_says_what_the_logs_say(study: SimpleNamespace) -> None:
    content = json.loads((study.out / "results.json").read_text())
    assert list(content["arms"]) == list(ARMS)
    for arm in ARMS:
        log = RunLog(study.out / arm / "seed_1" / "tensorboard")
        loss, het = (
            np.array([log.scalars(name)[step] for step in (2, 3, 4)])  # a quarter is left out
            for name in ("lm loss", "data/batch_het")
        )
        expected = {
            "batch_het": het.mean(),
            "loss_variance": ((loss[1] - loss[0]) ** 2 + (loss[2] - loss[1]) ** 2) / 4,
            "gradient_kurtosis": 1.5,  # of any three values
            "validation_loss": log.scalars("lm loss validation")[4],
        }
        for name, value in expected.items():
            assert content["arms"][arm][name]["values"] == pytest.approx([value], rel=1e-6), name
    assert (study.out / "buffer_study.png").read_bytes().startswith(b"\x89PNG")
    assert "BatchHet, RSDB against sequential" in study.output
    first = [RunLog(study.out / arm / "seed_1/tensorboard").scalars("lm loss")[1] for arm in ARMS]
    assert first[0] != first[1]  # other documents


def test_documents_come_clustered(tmp_path: Path) -> None:
    text = load_of_study("buffer_study", "clustered_text")
    kinds = text.read_kinds()
    assert len(kinds) == 5 and all(len(documents) > 100 for documents in kinds.values())
    for name, cluster_bytes in (("short", 1200), ("long", 65_536)):
        for seed in (1, 2):
            text.write_clustered(
                tmp_path / f"{name}_{seed}.jsonl", cluster_bytes=cluster_bytes, seed=seed
            )
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in tmp_path.glob("*.jsonl")
    }
    counts = [Counter(row["text"] for row in documents) for documents in rows.values()]
    assert all(count == counts[0] for count in counts)  # the same documents, each once
    assert set(counts[0].values()) == {1}
    assert rows["short_1"] != rows["short_2"]
    for name, cluster_bytes in (("short", 1200), ("long", 65_536)):
        runs = cut_runs(rows[f"{name}_1"])
        sizes = [sum(len(row["text"]) for row in run) for run in runs]
        # Neighbours of one kind may come together, so runs are at least as long as clusters.
        assert np.median(sizes) > 0.7 * cluster_bytes
        if name == "short":
            assert np.median(sizes) < 2.5 * cluster_bytes


def cut_runs(rows: list[dict]) -> list[list[dict]]:
    """Rows of one kind that follow each other."""
    runs: list[list[dict]] = []
    for row in rows:
        if not runs or runs[-1][-1]["kind"] != row["kind"]:
            runs.append([])
        runs[-1].append(row)
    return runs


def test_numbers_by_hand(results: ModuleType) -> None:
    assert results.step_variance(np.array([1.0, 3.0, 2.0])) == (4 + 1) / 4
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=0.3, size=20_000)
    # A slow fall does not count.
    assert results.step_variance(noise + np.linspace(9, 2, 20_000)) == pytest.approx(0.09, rel=0.05)
    # Of a coin that shows one side in a tenth of all throws.
    part = 0.1 * 0.9
    coin = np.array([5.0] + [2.0] * 9)
    assert results.kurtosis(coin) == pytest.approx((1 - 3 * part) / part)


def make_runs(values: dict[str, list[float]], name: str) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(arm=arm, seed=seed, numbers={name: value})
        for arm, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]


HOLDS = "lower. The report's direction holds; its -46%"
FAILS = "higher. The report's direction does not hold here, nor does its -46%"


@pytest.mark.parametrize(
    ("mine", "others", "verdict"),
    [
        ((0.40, 0.42, 0.41), (0.80, 0.83, 0.80), f"{HOLDS} is reached"),
        ((0.70, 0.72, 0.71), (0.80, 0.83, 0.80), f"{HOLDS} is not reached"),
        ((0.80, 0.83, 0.80), (0.70, 0.72, 0.71), FAILS),
        ((0.70, 0.82, 0.75), (0.80, 0.73, 0.75), "undecided"),
        ((0.40,), (0.80,), "lower in this one seed. The report's direction holds"),
    ],
)
def test_statement(
    mine: tuple[float, ...], others: tuple[float, ...], verdict: str, results: ModuleType
) -> None:
    runs = make_runs({"sequential": list(others), "rsdb": list(mine)}, "batch_het")
    text = results.compare(runs, "sequential", "batch_het")
    assert f": {verdict}" in text
    assert f"{np.mean(mine):.3f}" in text and f"against {np.mean(others):.3f}" in text
    runs = make_runs({"shuffled": list(others), "rsdb": list(mine)}, "batch_het")
    assert "report" not in results.compare(runs, "shuffled", "batch_het")


def test_losses_that_are_close_are_equal(results: ModuleType) -> None:
    runs = make_runs({"shuffled": [4.0, 4.1], "rsdb": [4.01, 4.11]}, "validation_loss")
    assert ": equal." in results.compare(runs, "shuffled", "validation_loss")
    runs = make_runs({"shuffled": [4.0, 4.1], "rsdb": [3.9, 4.01]}, "validation_loss")
    assert "-0.095 nats, lower in 2 of 2 seeds: lower." in results.compare(
        runs, "shuffled", "validation_loss"
    )
