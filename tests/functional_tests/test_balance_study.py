"""The balance study trains, draws and tabulates with one command, and never trains a run twice."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.functional_tests.launch import ROOT, TAKES_ALL, environment, only_in_all
from trinity_megatron.report.balance_windows import sampling_noise
from trinity_megatron.telemetry.metrics import max_violation
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG, RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STUDY = ROOT / "examples" / "balance_study"
RULES = ("none", "smebu")
SMALL = "--seeds 1 --steps 3 --seq-length 64 --global-batch-size 4 --eval-iters 1 --num-layers 2"


def start(out: Path, data: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the command."""
    command = [sys.executable, str(STUDY / "run.py"), "--out", str(out), "--data", str(data)]
    command += ["--rules", *RULES, *SMALL.split(), *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    if not TAKES_ALL:
        pytest.skip("several starts: a part of make test-all")
    out = tmp_path_factory.mktemp("study") / "out"
    result = start(out, data)
    assert result.returncode == 0, result.stdout + result.stderr
    return SimpleNamespace(out=out, output=result.stdout)


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The module of the study that condenses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        import results
    return results


def test_the_table_says_what_the_logs_say(study: SimpleNamespace) -> None:
    content = json.loads((study.out / "results.json").read_text())
    assert list(content["rules"]) == list(RULES)
    for rule in RULES:
        log = RunLog(study.out / rule / "seed_1" / "tensorboard")
        counts, bias = log.tensors(TOKENS_TAG), log.tensors(BIAS_TAG)
        last_step = bias[3].astype(np.float64) - bias[2]
        assert list(counts) == [1, 2, 3]
        expected = {  # the last quarter of three steps is one step
            "steady_violation": log.scalars("moe/mean_max_violation")[3],
            "early_violation": log.scalars("moe/mean_max_violation")[1],
            "validation_loss": log.scalars("lm loss validation")[3],
            "bias_range": log.scalars("moe/bias_range")[3],
            "dead_experts": log.scalars("moe/dead_experts")[3],
            "bias_step": np.sqrt(np.square(last_step).mean()),
            "summed_violation": max_violation(torch.from_numpy(counts[3])).mean().item(),
        }
        row = content["rules"][rule]
        assert row.pop("seeds") == [1]
        for name, value in expected.items():
            # TensorBoard keeps scalars in fp32.
            assert row[name]["values"] == pytest.approx([value], rel=1e-6), (rule, name)
            assert row[name]["mean"] == row[name]["values"][0] and row[name]["std"] is None
        assert set(row) == set(expected)
        assert f"{row['validation_loss']['mean']:.3f}" in (study.out / "results.md").read_text()
    still = content["rules"]["none"]
    assert still["bias_range"]["mean"] == 0 and content["rules"]["smebu"]["bias_range"]["mean"] > 0


def test_only_the_rule_acts(study: SimpleNamespace) -> None:
    logs = [RunLog(study.out / rule / "seed_1" / "tensorboard") for rule in RULES]
    for log in logs:
        assert not log.scalars("seq_load_balancing_loss")
    # Same seed: same weights and data until the bias of the first step is used.
    first = [log.scalars("lm loss")[1] for log in logs]
    assert first[0] == first[1]
    assert np.array_equal(*(log.tensors(TOKENS_TAG)[1] for log in logs))


def test_pictures(study: SimpleNamespace) -> None:
    for name in ("balance_maxvio.png", "balance_loss.png"):
        assert (study.out / name).read_bytes().startswith(b"\x89PNG")
        (study.out / name).unlink()
    command = [sys.executable, str(STUDY / "plot.py"), str(study.out)]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    assert (study.out / "balance_maxvio.png").stat().st_size > 10_000


def test_a_complete_run_is_not_trained_again(study: SimpleNamespace, data: Path) -> None:
    files = sorted(study.out.glob("*/seed_*/tensorboard/events.*")) + [study.out / "results.md"]
    before = [(file, file.read_bytes()) for file in files]
    again = start(study.out, data)
    assert again.returncode == 0, again.stderr
    assert "MaxVio" in again.stdout and "runs," not in again.stdout
    files = sorted(study.out.glob("*/seed_*/tensorboard/events.*")) + [study.out / "results.md"]
    assert [(file, file.read_bytes()) for file in files] == before
    other = start(study.out, data, "--update-rate", "0.5")
    assert other.returncode == 2 and "other flags" in other.stderr


@only_in_all
def test_a_failing_run_names_its_log(tmp_path: Path, data: Path) -> None:
    failed = start(tmp_path, data, "--moe-router-topk", "65")
    assert failed.returncode == 2
    assert "train.log" in failed.stderr and "--moe-router-topk 65" in failed.stderr
    assert not list(tmp_path.glob("*/*/complete.json"))


@pytest.mark.parametrize("mean_tokens", [32, 128])
def test_noise_floor(mean_tokens: int, results: ModuleType) -> None:
    floor = results.noise_floor(mean_tokens * 16, 64, 4, repeats=400)
    # Independent Poisson counts spread 1 / sqrt(1 - 4 / 64) = 3% more; 400 draws err by 1%.
    assert floor == pytest.approx(sampling_noise(mean_tokens, 64), rel=0.06)


@pytest.mark.parametrize(
    ("mine", "others", "losses", "verdict"),
    [
        ((0.30, 0.31, 0.32), (0.35, 0.36, 0.36), (4.01, 4.02), "holds"),
        ((0.35, 0.36, 0.36), (0.30, 0.31, 0.32), (4.01, 4.02), "does not hold"),
        ((0.30, 0.31, 0.38), (0.31, 0.35, 0.33), (4.01, 4.02), "undecided"),
        ((0.30, 0.31, 0.32), (0.35, 0.36, 0.36), (4.10, 4.02), "does not hold, its loss is higher"),
        ((0.30,), (0.35,), (4.01, 4.02), "holds for this one seed"),
    ],
)
def test_statement(
    mine: Sequence[float],
    others: Sequence[float],
    losses: tuple[float, float],
    verdict: str,
    results: ModuleType,
) -> None:
    runs = [
        SimpleNamespace(
            rule=rule, seed=seed, numbers={"steady_violation": value, "validation_loss": loss}
        )
        for rule, values, loss in (("smebu", mine, losses[0]), ("sign", others, losses[1]))
        for seed, value in enumerate(values)
    ]
    text = results.compare(runs, "smebu", "sign")
    assert f": {verdict}" in text
    assert f"SMEBU {np.mean(mine):.3f}" in text and f"against {losses[1]:.3f}" in text
