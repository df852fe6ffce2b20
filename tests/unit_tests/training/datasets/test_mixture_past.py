"""A resume may change what comes, and not what was read."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.indexed_data import write_dataset
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.data.mixture.mixture_file import load_mixture
from trinity_megatron.data.mixture.open_corpora import open_mixture
from trinity_megatron.errors import UserError

enter_host()

from trinity_megatron.training.datasets.data_identity import check_data, read_identity  # noqa: E402
from trinity_megatron.training.datasets.mixture_past import describe_mixture  # noqa: E402

CORPORA = "a: {path: a}, b: {path: b}"
FIRST = "{until: 80, weights: {a: 0.7, b: 0.3}}"
SECOND = "{until: 800, weights: {a: 1, b: 1}}"
THIRD = "{weights: {b: 1}}"
# 16 samples of 8 tokens: 128, in the second phase.
CONSUMED = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        write_dataset(tmp_path / name, [20] * 6, first=1000 * number)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    return tmp_path


def run(folder: Path, *phases: str, corpora: str = CORPORA, order: str = "shuffled") -> Namespace:
    path = folder / "mix.yaml"
    path.write_text(
        f"corpora: {{{corpora}}}\nphases: [{', '.join(phases)}]\norder: {order}\n"
        "tokenizer: tokenizer"
    )
    data = open_mixture(load_mixture(path))
    args = plain(folder, *(str(item.train) for item in data.corpora.values()))
    args.data_mixture = describe_mixture(data, 8)
    return args


def plain(folder: Path, *prefixes: str) -> Namespace:
    names = ("data_path", "data_args_path", "per_split_data_args_path", "split")
    values: dict[str, Any] = dict.fromkeys((*names, "valid_data_path", "test_data_path"))
    args = Namespace(
        **values,
        train_data_path=list(prefixes),
        mock_data=False,
        allow_data_change=False,
        load=str(folder / "checkpoints"),
        seed=1,
        seq_length=8,
        phase_transition_iterations=None,
        consumed_train_samples=CONSUMED,
        data_mixture=None,
    )
    args.data_identity = read_identity(args)
    return args


ALLOWED = {
    "the same": (FIRST, SECOND, THIRD),
    "the same weights in other numbers": (FIRST.replace("0.7, b: 0.3", "7, b: 3"), SECOND, THIRD),
    "another last phase": (FIRST, SECOND, "{weights: {a: 1}}"),
    "another end of the present phase": (FIRST, SECOND.replace("800", "128"), "{weights: {a: 1}}"),
    "no later phase": (FIRST, SECOND),
}  # fmt: skip
REFUSED = {
    "another weight of a phase that is over": (
        (FIRST.replace("0.7", "0.6"), SECOND, THIRD), ("phase 1", "a 7, b 3 -> a 2, b 1")),
    "another weight of the present phase": (
        (FIRST, SECOND.replace("a: 1", "a: 2"), THIRD), ("phase 2", "until: 128")),
    "another end of a phase that is over": (
        (FIRST.replace("80", "88"), SECOND, THIRD), ("phase 1: 0 to 80 -> 0 to 88",)),
    "a present phase that has ended before": (
        (FIRST, SECOND.replace("800", "120"), THIRD),
        ("phase 2: 80 to 128 -> 80 to 120", "phase 3", "new")),
    "a phase that is gone": ((FIRST.replace("80", "800"), THIRD), ("phase 1", "phase 2", "gone")),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_what_comes_may_change(name: str, folder: Path) -> None:
    check_data(run(folder, FIRST, SECOND, THIRD), 2, run(folder, *ALLOWED[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_read_may_not(name: str, folder: Path) -> None:
    phases, expected = REFUSED[name]
    saved, now = run(folder, FIRST, SECOND, THIRD), run(folder, *phases)
    with pytest.raises(UserError) as error:
        check_data(saved, 2, now)
    for words in ("--load", "Remedy: ", "--allow-data-change", *expected):
        assert words in str(error.value), str(error.value)
    now.allow_data_change = True
    check_data(saved, 2, now)


def test_a_corpus_may_come_later(folder: Path) -> None:
    more = run(folder, FIRST, SECOND, "{weights: {c: 1}}", corpora=f"c: {{path: c}}, {CORPORA}")
    check_data(run(folder, FIRST, SECOND, THIRD), 2, more)


def test_other_content_under_the_same_name(folder: Path) -> None:
    saved = run(folder, FIRST, SECOND, THIRD)
    write_dataset(folder / "a", [20] * 7)
    with pytest.raises(UserError, match="the content of its corpora"):
        check_data(saved, 2, run(folder, FIRST, SECOND, THIRD))


def test_another_order(folder: Path) -> None:
    with pytest.raises(UserError, match="order shuffled -> sequential.*Remedy: order: shuffled"):
        check_data(run(folder, FIRST, SECOND), 2, run(folder, FIRST, SECOND, order="sequential"))


def test_a_run_of_one_folder_goes_on_as_a_mixture(folder: Path) -> None:
    """Its order is that of a phase with one corpus."""
    saved = plain(folder, str(folder / "a"))
    check_data(saved, 2, run(folder, "{until: 128, weights: {a: 1}}", SECOND))
    with pytest.raises(UserError, match="phase 1"):
        check_data(saved, 2, run(folder, FIRST, SECOND))
    with pytest.raises(UserError, match="a blend of --data-path"):
        check_data(plain(folder, *(str(folder / n) for n in "abc")), 2, run(folder, FIRST, SECOND))


def test_a_mixture_does_not_go_on_as_another_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="phase 1"):
        check_data(run(folder, FIRST, SECOND), 2, plain(folder, str(folder / "a")))
