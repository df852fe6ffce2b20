"""Data are known by their content, and a resume with others is refused."""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.indexed_data import write_dataset
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.data.index_file import read_head
from trinity_megatron.errors import UserError

enter_host()

from trinity_megatron.training.datasets import data_identity  # noqa: E402
from trinity_megatron.training.datasets.data_identity import (  # noqa: E402
    check_data,
    describe_dataset,
    differences,
    fingerprints_of,
    read_identity,
)

SPLITS = ("train_data_path", "valid_data_path", "test_data_path")


def make_args(**given: Any) -> Namespace:
    names = ("data_path", "data_args_path", "per_split_data_args_path", "split", *SPLITS)
    values = {**dict.fromkeys(names), "mock_data": False, "allow_data_change": False}
    values |= {"load": "run/checkpoints", "seed": 1, "seq_length": 8}
    values["phase_transition_iterations"] = None
    args = Namespace(**{**values, **given})
    args.data_identity = read_identity(args)
    return args


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "a", [20] * 6)
    write_dataset(tmp_path / "b", [9] * 5, first=500)
    write_dataset(tmp_path / "v", [30] * 2, first=900)
    return tmp_path


def resume(before: Namespace, now: Namespace, step: int = 4) -> None:
    before.consumed_train_samples = 16
    check_data(before, step, now)


def flags(folder: Path, **given: str) -> dict[str, Any]:
    """Arguments in which a, b and v stand for the datasets."""

    def put(word: str) -> str:
        return str(folder / word) if word in ("a", "b", "v") else word

    paths = (*SPLITS, "data_path")
    return {
        name: [put(word) for word in value.split()] if name in paths else value
        for name, value in given.items()
    }


# What each command line says of the data; all read a, most b too.
LINES = {
    "one": {"train_data_path": "a", "valid_data_path": "v"},
    "pair": {"train_data_path": "0.3 a 0.7 b", "valid_data_path": "v"},
    "no weights": {"train_data_path": "a", "valid_data_path": "1 v 1 b"},
    "cut": {"data_path": "a", "split": "90,10,0"},
    "cut pair": {"data_path": "2 a 1 b", "split": "90,10,0"},
    "default cut": {"data_path": "a"},
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_the_same_data_elsewhere_go_on(
    line: dict[str, str], datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = make_args(**flags(datasets, **line))
    moved = datasets / "moved"
    moved.mkdir()
    for path in [path for path in datasets.iterdir() if path.is_file()]:
        path.rename(moved / path.name)
        os.utime(moved / path.name, (0, 0))
    now = make_args(**flags(moved, **line))
    resume(before, now)
    assert capsys.readouterr().out == ""
    contents = set(fingerprints_of(now.data_identity).values())
    assert contents and contents == set(fingerprints_of(before.data_identity).values())


def rewrite(folder: Path, name: str, change: str) -> None:
    """Other data under an old path."""
    lengths = {"a": [20] * 6, "b": [9] * 5, "v": [30] * 2}[name]
    first = {"a": 1, "b": 500, "v": 900}[name]
    if change == "more":
        lengths = [*lengths, 7]
    elif change == "order":
        lengths = [lengths[0] - 1, *lengths[1:-1], lengths[-1] + 1]
    else:  # other text with the same lengths
        first += 1
    write_dataset(folder / name, lengths, first)


@pytest.mark.parametrize("change", ["more", "order", "text"])
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_other_data_under_the_old_path_are_refused(
    line: dict[str, str], change: str, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(datasets, **line)
    before = make_args(**given)
    rewrite(datasets, "a", change)
    now = make_args(**given)
    numbers = f"6 documents, 120 tokens .*-> {7 if change == 'more' else 6} documents"
    with pytest.raises(ValueError, match=f"--load .* other data: .*{numbers}.*Remedy: .*--out"):
        resume(before, now)
    allowed = make_args(**given, allow_data_change=True)
    resume(before, allowed)
    said = capsys.readouterr().out
    assert "A new order begins; the first 16 sequences" in said and said.count("\n") == 1
    resume(allowed, make_args(**given))  # from the next checkpoint on these are the data
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("0.3 a 0.7 b", "0.5 a 0.5 b", "dataset 1, weight 0.3 -> 0.5; dataset 2, weight 0.7"),
        ("1 a 1 b", "1 b 1 a", "dataset 1, 6 documents, .* -> 5 documents"),
        ("1 a 1 b", "a", "dataset 2, 5 documents, .* -> none"),
        ("a", "b", "6 documents, .* -> 5 documents"),
    ],
)
def test_another_blend(before: str, now: str, expected: str, datasets: Path) -> None:
    old, new = (make_args(**flags(datasets, train_data_path=line)) for line in (before, now))
    with pytest.raises(ValueError, match=f"other data: .*{expected}.*Remedy: "):
        resume(old, new)


def test_weights_are_shares(datasets: Path) -> None:
    lines = ("3 a 7 b", "30 a 70 b"), ("a", "2 a")
    for one, other in lines:
        resume(*(make_args(**flags(datasets, train_data_path=line)) for line in (one, other)))


def test_another_split(datasets: Path) -> None:
    cut = [
        make_args(**flags(datasets, data_path="a", split=s)) for s in ("9,1,0", "8,2,0", "90,10")
    ]
    resume(cut[0], cut[2])
    with pytest.raises(ValueError, match="split .0.9, 0.1, 0.0. -> .0.8, 0.2, 0.0."):
        resume(cut[0], cut[1])


def test_a_file_with_the_blend(datasets: Path) -> None:
    listed = datasets / "blend.txt"
    listed.write_text(f"0.3 {datasets / 'a'} 0.7 {datasets / 'b'}")
    before = make_args(data_args_path=str(listed), split="1,0,0")
    resume(before, make_args(**flags(datasets, data_path="3 a 7 b", split="1,0,0")))
    rewrite(datasets, "b", "text")
    with pytest.raises(ValueError, match="other data: dataset 2, 5 documents"):
        resume(before, make_args(data_args_path=str(listed), split="1,0,0"))


@pytest.mark.parametrize("change", ["more", "order", "text"])
def test_other_validation_data_are_said(
    change: str, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(datasets, train_data_path="a", valid_data_path="v")
    before = make_args(**given)
    rewrite(datasets, "v", change)
    resume(before, make_args(**given))
    said = capsys.readouterr().out
    assert said.startswith("> the validation data have changed: 2 documents, 60 tokens")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [("seed", 2), ("seq_length", 16)])
def test_another_order_is_said(
    name: str, value: int, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(datasets, train_data_path="a")
    resume(make_args(**given), make_args(**given, **{name: value}))
    assert f"> {name} is {value} and was" in capsys.readouterr().out


def test_a_new_phase_has_its_own_data(datasets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = make_args(**flags(datasets, train_data_path="a"))
    new = make_args(**flags(datasets, train_data_path="b"), phase_transition_iterations="4, 8")
    resume(old, new, step=4)
    assert "a phase ends with step 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other data"):
        resume(old, new, step=5)


@pytest.mark.parametrize(
    ("train_iters", "is_said"), [(3, False), (4, True), (100, True), (None, False)]
)
def test_checkpoints_of_earlier_releases(
    train_iters: int | None, is_said: bool, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # An epoch has 120 tokens, and a step reads 4 x 8.
    saved = Namespace(train_iters=train_iters, global_batch_size=4, consumed_train_samples=16)
    check_data(saved, 4, make_args(**flags(datasets, train_data_path="a")))
    assert ("earlier release" in capsys.readouterr().out) == is_said


def test_nothing_was_read_yet(datasets: Path) -> None:
    old, new = (make_args(**flags(datasets, train_data_path=name)) for name in ("a", "b"))
    old.consumed_train_samples = 0
    check_data(old, 0, new)


def test_mock_data_have_no_identity(datasets: Path) -> None:
    args = make_args(**flags(datasets, train_data_path="a"), mock_data=True)
    assert args.data_identity is None and fingerprints_of(args.data_identity) == {}


def test_an_object_storage_is_not_read(datasets: Path) -> None:
    args = make_args(train_data_path=["s3://bucket/data"])
    assert (
        args.data_identity["train"][0]["content"] is None
        and fingerprints_of(args.data_identity) == {}
    )
    resume(args, args)


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(b"\xff")


def test_large_files_are_read_in_blocks(datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = describe_dataset(str(datasets / "a"))
    monkeypatch.setattr(data_identity, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(data_identity, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(data_identity, "_BLOCKS", 5)
    known = describe_dataset(str(datasets / "a"))
    assert known["content"] != whole["content"]
    assert describe_dataset(str(datasets / "a")) == known
    for offset in (0, -1, (480 - 16) // 4):
        shutil.copy(datasets / "a.idx", datasets / "copy.idx")
        shutil.copy(datasets / "a.bin", datasets / "copy.bin")
        spoil(datasets / "copy.bin", offset)
        assert describe_dataset(str(datasets / "copy"))["content"] != known["content"]


def test_a_file_that_has_changed_since_its_head_was_read(datasets: Path) -> None:
    prefix = datasets / "a"
    index, tokens = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    head = read_head(index, tokens)
    assert describe_dataset(str(prefix), head) == describe_dataset(str(prefix))
    os.utime(tokens, ns=(0, 1))
    for read in (
        lambda: describe_dataset(str(prefix), head),
        lambda: head.check_unchanged(prefix),
    ):
        with pytest.raises(UserError, match="a.bin has changed .*: it has been written since"):
            read()
    tokens.write_bytes(tokens.read_bytes() + b"1234")
    with pytest.raises(UserError, match="a.bin has changed .*: it has 484 bytes and had 480"):
        describe_dataset(str(prefix), head)
    os.utime(index, ns=(0, 1))
    with pytest.raises(UserError, match="a.idx has changed .*Remedy: start again when nothing"):
        head.check_unchanged(prefix)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.idx").unlink(), "cannot be read .*a.idx.*Remedy: the path"),
        (lambda folder: (folder / "a.bin").unlink(), "cannot be read .*a.bin.*Remedy: the path"),
        (lambda folder: (folder / "a.idx").write_bytes(b""), "does not begin as an index"),
        (lambda folder: spoil(folder / "a.idx", 17), "does not begin as an index"),
        (lambda folder: (folder / "a.idx").write_text("x" * 100), "does not begin as an index"),
    ],
)
def test_no_dataset(damage: Callable[[Path], Any], message: str, datasets: Path) -> None:
    damage(datasets)
    with pytest.raises(ValueError, match=message):
        make_args(**flags(datasets, train_data_path="a"))


def test_only_the_first_differences_are_listed(datasets: Path) -> None:
    one = make_args(**flags(datasets, train_data_path="1 a 1 a 1 a 1 a 1 a")).data_identity
    other = make_args(**flags(datasets, train_data_path="1 b 1 b 1 b 1 b 1 b")).data_identity
    lines = differences(one, other)["train"]
    assert len(lines) == 4 and lines[-1] == "and 2 more"
