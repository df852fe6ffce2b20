"""Branches of a running pretraining: they anneal, resume exactly, and leave their parent alone."""

import argparse
import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.functional_tests.launch import Job, train
from trinity_megatron.checkpoint.convert import megatron_to_hf
from trinity_megatron.errors import UserError
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, RunLog
from trinity_megatron.training.branch import prepare_branch
from trinity_megatron.training.resume import check_lineage, read_saved_state

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BATCH, LENGTH = 8, 64
# A plateau after a warm-up of 4 steps; the parent's own decay begins after step 16.
MAIN = (
    "--train-iters 20 --lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-warmup-fraction 0.2 "
    "--save-interval 5"
)
# From 64 tokens to 200, with the rates of a re-warm-up; --max-position-embeddings is still 64.
EXTENDED = "--train-iters 3 --seq-length 200 --lr 1e-3 --decoupled-lr 3e-4 --lr-warmup-fraction 0.4"
SIX_STEPS = 6 * BATCH * LENGTH


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("branch")
    names = ("whole", "main", "early", "late", "again", "cosine", "other", "of_branch", "longer")
    ckpt = {name: folder / name / "checkpoints" for name in names}

    def branch(step: int, parent: str = "main", tokens: int = SIX_STEPS) -> str:
        return f"{MAIN} --branch-from {ckpt[parent]} --branch-step {step} --anneal-tokens {tokens} "

    other = f"--train-data-path {data}/validation --allow-data-change"
    first = [
        Job("whole", MAIN, ckpt["whole"]),
        Job("main", f"{MAIN} --exit-interval 10", ckpt["main"]),
    ]
    logs = train(data, folder, [(1, first)])
    before = fingerprints(ckpt["main"])
    branches = [
        Job("early", branch(5), ckpt["early"]),
        Job("late", branch(10), ckpt["late"]),
        Job("again", f"{branch(10)} --exit-interval 13", ckpt["again"]),
        Job("cosine", f"{branch(10, tokens=SIX_STEPS - 5)} --anneal-style cosine", ckpt["cosine"]),
        Job("other", f"{branch(10)} {other}", ckpt["other"]),
    ]
    logs.update(train(data, folder, [(1, branches)]))
    after = fingerprints(ckpt["main"])
    rest = [
        Job("main", MAIN, ckpt["main"]),
        Job("again", branch(10), ckpt["again"]),
        Job("of_branch", branch(13, parent="again"), ckpt["of_branch"]),
        Job("longer", f"{EXTENDED} --pretrained-checkpoint {ckpt['late']}", ckpt["longer"]),
    ]
    logs.update(train(data, folder, [(1, rest)]))
    return SimpleNamespace(logs=logs, checkpoints=ckpt, before=before, after=after)


def values(log: RunLog, tag: str) -> list[float]:
    return list(log.scalars(tag).values())


def test_the_parent_is_only_read(runs: SimpleNamespace) -> None:
    assert runs.before == runs.after and len(runs.before) > 5
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        assert runs.logs["main"].scalars(tag) == runs.logs["whole"].scalars(tag), tag


@pytest.mark.parametrize(("name", "step"), [("early", 5), ("late", 10), ("cosine", 10)])
def test_rates_go_to_zero_from_those_of_the_parent(
    name: str, step: int, runs: SimpleNamespace
) -> None:
    log, parent = runs.logs[name], runs.logs["whole"]
    steps = list(range(step + 1, step + 7))
    done = np.arange(6) / 6
    share = 1 - done if name != "cosine" else (1 + np.cos(np.pi * done)) / 2
    for tag in ("lr/muon", "lr/adamw"):
        assert list(log.scalars(tag)) == steps
        # The rate of the plateau, which the parent's next step has too.
        plateau = parent.scalars(tag)[step + 1]
        np.testing.assert_allclose(values(log, tag), plateau * share, atol=1e-6 * plateau)
    # The first step reads what the parent reads next, at its rates, with its optimizer and bias; so
    # the second begins at the same weights.
    for tag, number in (("lm loss", 1), ("lm loss", 2), ("grad-norm", 2)):
        assert log.scalars(tag)[step + number] == parent.scalars(tag)[step + number]
    expected = parent.tensors(BIAS_TAG)[step + 1]
    assert np.array_equal(log.tensors(BIAS_TAG)[step + 1], expected)


def test_a_branch_resumes_exactly(runs: SimpleNamespace) -> None:
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        assert runs.logs["again"].scalars(tag) == runs.logs["late"].scalars(tag), tag
    assert len(values(runs.logs["again"], "lm loss")) == 6


def test_other_data_and_branches_of_branches(runs: SimpleNamespace) -> None:
    other, late = runs.logs["other"], runs.logs["late"]
    assert values(other, "learning-rate") == values(late, "learning-rate")
    assert values(other, "lm loss")[0] != values(late, "lm loss")[0]
    rates = runs.logs["of_branch"].scalars("learning-rate")
    left = late.scalars("learning-rate")[13]
    assert list(rates) == list(range(14, 20))
    share = 1 - np.arange(1, 7) / 6
    np.testing.assert_allclose(list(rates.values()), left * share, atol=1e-6 * left)


def test_the_lineage_is_in_the_checkpoints(runs: SimpleNamespace) -> None:
    common, _ = read_saved_state(runs.checkpoints["of_branch"])
    lineage = common["args"].lineage
    assert lineage["parent"] == str(runs.checkpoints["again"])
    assert (lineage["step"], lineage["consumed_tokens"]) == (13, 13 * BATCH * LENGTH)
    assert (lineage["anneal_tokens"], lineage["anneal_style"]) == (SIX_STEPS, "linear")
    before = lineage["before"]
    assert (before["parent"], before["step"]) == (str(runs.checkpoints["main"]), 10)
    assert before["before"] is None
    common, _ = read_saved_state(runs.checkpoints["whole"])
    assert common["args"].lineage is None


def test_an_export_says_where_it_comes_from_and_how_long_it_reads(
    runs: SimpleNamespace, tmp_path: Path
) -> None:
    for name in ("of_branch", "longer", "whole"):
        megatron_to_hf(runs.checkpoints[name], tmp_path / name)
    card = (tmp_path / "of_branch" / "README.md").read_text()
    lines = [line for line in card.splitlines() if line.startswith("- ")]
    assert lines == [
        "- Annealed (linear, learning rate to 0) over 3,072 tokens from step 13 (6,656 tokens) of "
        "the run `again`.",
        "- Annealed (linear, learning rate to 0) over 3,072 tokens from step 10 (5,120 tokens) of "
        "the run `main`.",
    ]
    assert not (tmp_path / "whole" / "README.md").exists()
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert config["max_position_embeddings"] == 200
    assert (config["sliding_window"], config["rope_theta"]) == (16, 10000)


def make_args(runs: SimpleNamespace, **given: object) -> argparse.Namespace:
    common, _ = read_saved_state(runs.checkpoints["main"], 10)
    args = copy.copy(common["args"])
    values = {"branch_from": str(runs.checkpoints["main"]), "anneal_tokens": "1M", "save": "new"}
    vars(args).update({**values, "branch_step": 10, "train_samples": None, **given})
    return args


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"branch_from": None}, ("--branch-step 10 without --branch-from",)),
        ({"anneal_tokens": None}, ("without --anneal-tokens",)),
        ({"anneal_tokens": "1.5"}, ("--anneal-tokens", "whole number")),
        ({"save": None}, ("--out",)),
        ({"finetune": True}, ("--finetune with --branch-from",)),
        ({"branch_from": "nowhere"}, ("--branch-from nowhere", "holds no checkpoint")),
        ({"branch_step": 7}, ("7 is not in", "5, 10")),
        ({"branch_from": "late", "branch_step": 16}, ("learning rate is 0", "earlier")),
        ({"branch_step": None, "world_size": 2}, ("--branch-step 20",)),
        ({"lr": 1.0}, ("--lr 1.0", "the flags of that run")),
        ({"save": "main"}, ("no branch", "another --out")),
        ({"save": "again", "anneal_tokens": "1M"}, ("--anneal-tokens 1000000", "another --out")),
    ],
)
def test_refused(given: dict[str, object], words: tuple[str, ...], runs: SimpleNamespace) -> None:
    given = {
        name: str(runs.checkpoints.get(value, value)) if isinstance(value, str) else value
        for name, value in given.items()
    }
    with pytest.raises(UserError) as error:
        prepare_branch(make_args(runs, **given))
    assert all(word in str(error.value) for word in (*words, "Remedy: ")), error.value


def test_a_branch_is_not_gone_on_with_as_a_plain_run(runs: SimpleNamespace) -> None:
    common, _ = read_saved_state(runs.checkpoints["late"])
    args = argparse.Namespace(load="late", lineage=None)
    with pytest.raises(UserError, match="--branch-step 10 --anneal-tokens 3072"):
        check_lineage(common["args"], args)
