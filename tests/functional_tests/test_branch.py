"""Branches of a running pretraining: they anneal, resume exactly, and leave their parent alone."""

import argparse
import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.functional_tests.launch import Job, only_in_all, train
from trinity_megatron.checkpoint.convert import megatron_to_hf
from trinity_megatron.errors import UserError
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, RunLog
from trinity_megatron.training.branch import prepare_branch
from trinity_megatron.training.lineage import check_lineage
from trinity_megatron.training.resume import read_saved_state

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BATCH, LENGTH = 8, 64
# A plateau after a warm-up of 3 steps; the parent's own decay begins after step 10.
MAIN = (
    "--train-iters 12 --lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-warmup-fraction 0.25 "
    "--save-interval 3 --num-layers 2 --global-attn-every-n-layers 2 --num-experts 8"
)
# From 64 tokens to 200, with the rates of a re-warm-up; --max-position-embeddings is still 64.
EXTENDED = f"{MAIN} --train-iters 2 --seq-length 200 --lr 2e-3 --decoupled-lr 6e-4"
TOKENS = 4 * BATCH * LENGTH


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

    def branch(step: int, parent: str = "main", tokens: int = TOKENS) -> str:
        return f"{MAIN} --branch-from {ckpt[parent]} --branch-step {step} --anneal-tokens {tokens} "

    other = f"--train-data-path {data}/validation"
    first = [
        Job("whole", MAIN, ckpt["whole"]),
        Job("main", f"{MAIN} --exit-interval 6", ckpt["main"]),
    ]
    logs = train(data, folder, [(1, first)])
    before = fingerprints(ckpt["main"])
    branches = [
        Job("early", branch(3), ckpt["early"]),
        Job("late", f"{branch(6)} --on-damage previous", ckpt["late"]),
        Job("again", f"{branch(6)} --exit-interval 8", ckpt["again"]),
        Job("cosine", f"{branch(6, tokens=TOKENS - 5)} --anneal-style cosine", ckpt["cosine"]),
        Job("other", f"{branch(6)} {other}", ckpt["other"]),
    ]
    rest = [
        Job("main", MAIN, ckpt["main"]),
        Job("again", f"{branch(6)} --on-damage previous", ckpt["again"]),
        Job("of_branch", branch(8, parent="again"), ckpt["of_branch"]),
        Job("longer", f"{EXTENDED} --pretrained-checkpoint {ckpt['late']}", ckpt["longer"]),
    ]
    logs.update(train(data, folder, [(1, [*branches, *rest])]))
    after = fingerprints(ckpt["main"])
    return SimpleNamespace(logs=logs, checkpoints=ckpt, before=before, after=after)


def values(log: RunLog, tag: str) -> list[float]:
    return list(log.scalars(tag).values())


def test_the_parent_is_only_read(runs: SimpleNamespace) -> None:
    same = {name for name, value in runs.before.items() if runs.after.get(name) == value}
    # It has gone on meanwhile, and saved.
    assert set(runs.before) - same == {"latest_checkpointed_iteration.txt"} and len(same) > 5
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        assert runs.logs["main"].scalars(tag) == runs.logs["whole"].scalars(tag), tag


@pytest.mark.parametrize(("name", "step"), [("early", 3), ("late", 6), ("cosine", 6)])
def test_rates_go_to_zero_from_those_of_the_parent(
    name: str, step: int, runs: SimpleNamespace
) -> None:
    log, parent = runs.logs[name], runs.logs["whole"]
    steps = list(range(step + 1, step + 5))
    done = np.arange(4) / 4
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
    assert len(values(runs.logs["again"], "lm loss")) == 4


def test_other_data_and_branches_of_branches(runs: SimpleNamespace) -> None:
    other, late = runs.logs["other"], runs.logs["late"]
    assert values(other, "learning-rate") == values(late, "learning-rate")
    assert values(other, "lm loss")[0] != values(late, "lm loss")[0]
    rates = runs.logs["of_branch"].scalars("learning-rate")
    left = late.scalars("learning-rate")[8]
    assert list(rates) == list(range(9, 13))
    share = 1 - np.arange(1, 5) / 4
    np.testing.assert_allclose(list(rates.values()), left * share, atol=1e-6 * left)


def test_the_lineage_is_in_the_checkpoints(runs: SimpleNamespace) -> None:
    common, _ = read_saved_state(runs.checkpoints["of_branch"])
    lineage = common["args"].lineage
    assert lineage["parent"] == str(runs.checkpoints["again"])
    assert (lineage["step"], lineage["consumed_tokens"]) == (8, 8 * BATCH * LENGTH)
    assert (lineage["anneal_tokens"], lineage["anneal_style"]) == (TOKENS, "linear")
    before = lineage["before"]
    assert (before["parent"], before["step"]) == (str(runs.checkpoints["main"]), 6)
    assert before["before"] is None
    assert json.loads(json.dumps(lineage)) == lineage  # so it is in W&B's config
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
        "- Annealed (linear, learning rate to 0) over 2,048 tokens from step 8 (4,096 tokens) of "
        "the run `again`.",
        "- Annealed (linear, learning rate to 0) over 2,048 tokens from step 6 (3,072 tokens) of "
        "the run `main`.",
    ]
    assert not (tmp_path / "whole" / "README.md").exists()
    card = (tmp_path / "longer" / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("- ")] == [
        "- Trained with sequences of 200 tokens from step 10 (5,120 tokens) of the run `late`.",
        "- Annealed (linear, learning rate to 0) over 2,048 tokens from step 6 (3,072 tokens) of "
        "the run `main`.",
    ]
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert config["max_position_embeddings"] == 200
    assert (config["sliding_window"], config["rope_theta"]) == (16, 10000)


@only_in_all
def test_an_annealed_branch_is_better_than_its_parent(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three seeds: validation loss after 160 steps at the plateau, and with 40 of them annealed."""
    folder = tmp_path_factory.mktemp("annealed")
    plateau = (
        "--train-iters 160 --lr-decay-style WSD --lr-wsd-decay-iters 1 --lr-warmup-fraction 0.1 "
        "--save-interval 120 --eval-interval 40 --eval-iters 16"
    )
    jobs, tokens = [], 40 * BATCH * LENGTH
    for seed in (1, 2, 3):
        main = folder / f"main{seed}" / "checkpoints"
        flags = f"{plateau} --seed {seed}"
        branch = f"{flags} --branch-from {main} --branch-step 120 --anneal-tokens {tokens}"
        jobs += [Job(f"main{seed}", flags, main)]
        jobs += [Job(f"branch{seed}", branch, folder / f"branch{seed}" / "checkpoints")]
    logs = train(data, folder, [(1, jobs)])
    for seed in (1, 2, 3):
        main, branch = (
            logs[f"{name}{seed}"].scalars("lm loss validation") for name in ("main", "branch")
        )
        assert branch[160] < main[160] - 0.02


def make_args(runs: SimpleNamespace, **given: object) -> argparse.Namespace:
    common, _ = read_saved_state(runs.checkpoints["main"], 6)
    args = copy.copy(common["args"])
    values = {"branch_from": str(runs.checkpoints["main"]), "anneal_tokens": "1M", "save": "new"}
    vars(args).update({**values, "branch_step": 6, "train_samples": None, **given})
    return args


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"branch_from": None}, ("--branch-step 6 without --branch-from",)),
        ({"anneal_tokens": None}, ("without --anneal-tokens",)),
        ({"anneal_tokens": "1.5"}, ("--anneal-tokens", "whole number")),
        ({"save": None}, ("--out",)),
        ({"finetune": True}, ("--finetune with --branch-from",)),
        ({"branch_from": "nowhere"}, ("--branch-from nowhere", "holds no checkpoint")),
        ({"branch_step": 7}, ("7 is not in", "3, 6, 9")),
        ({"branch_from": "late", "branch_step": 10}, ("learning rate is 0", "earlier")),
        ({"branch_step": None, "world_size": 2}, ("--branch-step 12",)),
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
    with pytest.raises(UserError, match="--branch-step 6 --anneal-tokens 2048"):
        check_lineage(common["args"], args)
