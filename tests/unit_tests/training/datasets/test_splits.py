"""Where validation and training sequences come from, and sets that are too short."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402

from trinity_megatron.training.datasets.splits import (  # noqa: E402
    Source,
    check_splits,
    check_unweighted,
    split_sources,
)


def make_set(prefix: Path, *lengths: int) -> str:
    """An indexed dataset of documents of so many tokens, numbered through."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    first = 0
    for length in lengths:
        builder.add_document(torch.arange(first, first + length), [length])
        first += length
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def arguments(**values: Any) -> Any:
    """Megatron's, as far as they are read."""
    names = "data_path data_args_path per_split_data_args_path train_data_path valid_data_path"
    base: dict[str, Any] = dict.fromkeys([*names.split(), "test_data_path", "split"])
    base |= {"mock_data": False, "eval_iters": 8, "full_validation": False, "skip_train": False}
    base |= {"seq_length": 64, "eval_global_batch_size": 4, "global_batch_size": 4, "rank": 0}
    base |= {"data_is_chat": False}
    return SimpleNamespace(**{**base, **values})


def test_blends_of_validation_sets(tmp_path: Path) -> None:
    a, b = make_set(tmp_path / "a", 100), make_set(tmp_path / "b", 200, 50)
    args = arguments(train_data_path=[a], valid_data_path=["0.3", a, "0.7", b])
    train, valid, test = split_sources(args)
    assert [(s.prefix, s.weight) for s in train] == [(a, None)]
    assert [(s.prefix, s.weight, s.num_tokens()) for s in valid] == [(a, 0.3, 100), (b, 0.7, 250)]
    assert test == []
    assert valid[1].flag == f"--valid-data-path {b}"
    # Megatron reads two prefixes that are no numbers as a blend by size.
    valid = split_sources(arguments(train_data_path=[a], valid_data_path=[a, b]))[1]
    assert [(s.prefix, s.weight) for s in valid] == [(a, None), (b, None)]


@pytest.mark.parametrize("flag", ["data_path", "data_args_path"])
def test_shares_of_one_set(flag: str, tmp_path: Path) -> None:
    prefix = make_set(tmp_path / "x", *[10] * 90, *[20] * 5, *[30] * 5)
    value: Any = ["1", prefix]
    if flag == "data_args_path":
        value = str(tmp_path / "paths")
        Path(value).write_text(f"1 {prefix}")
    train, valid, test = split_sources(arguments(**{flag: value}, split="90,5,5"))
    assert [source.num_tokens() for source in (*train, *valid, *test)] == [900, 100, 150]
    assert [source.num_sequences(9) for source in (*train, *valid, *test)] == [99, 11, 16]
    assert valid[0].bounds(100) == (90, 95)
    assert "valid part of --split 90,5,5" in valid[0].flag
    assert split_sources(arguments(**{flag: value}, split="100,0,0"))[1:] == ([], [])


def test_a_file_of_splits(tmp_path: Path) -> None:
    a, b = make_set(tmp_path / "a", 100), make_set(tmp_path / "b", 200)
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"train": ["1", a], "valid": f"2 {b} 1 {a}", "test": None}))
    train, valid, test = split_sources(arguments(per_split_data_args_path=str(file)))
    assert [(s.prefix, s.weight) for s in (*train, *valid)] == [(a, 1.0), (b, 2.0), (a, 1.0)]
    assert test == [] and str(file) in valid[0].flag
    for content in ('{"train": ["1", "a"]}', "no json", '{"train": "1 a 2", "valid": "x 1"}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"--per-split-data-args-path .*splits.json.*Remedy:"):
            split_sources(arguments(per_split_data_args_path=str(file)))


@pytest.mark.parametrize(
    ("lengths", "tokens"), [((), "0"), ((1,), "1"), ((30, 34), "64"), ((64,), "64")]
)
def test_sets_that_are_too_short(lengths: tuple[int, ...], tokens: str, tmp_path: Path) -> None:
    good, short = make_set(tmp_path / "good", 65), make_set(tmp_path / "short", *lengths)
    check_splits(arguments(train_data_path=[good], valid_data_path=[good]))
    words = rf"short has {tokens} tokens, .* --seq-length 64 .*Remedy: "
    with pytest.raises(ValueError, match=rf"--valid-data-path .*{words}--eval-iters 0"):
        check_splits(arguments(train_data_path=[good], valid_data_path=[short]))
    with pytest.raises(ValueError, match=rf"--train-data-path .*{words}a shorter --seq-length"):
        check_splits(arguments(train_data_path=[short], valid_data_path=[good]))
    # A member of a blend, and what this run does not read.
    with pytest.raises(ValueError, match=words):
        check_splits(arguments(train_data_path=["1", good, "1", short], valid_data_path=[good]))
    check_splits(arguments(train_data_path=["1", good, "0", short], valid_data_path=[good]))
    check_splits(arguments(train_data_path=[good], valid_data_path=[short], eval_iters=0))
    check_splits(arguments(train_data_path=[short], valid_data_path=[good], skip_train=True))


def test_a_share_that_is_too_short(tmp_path: Path) -> None:
    prefix = make_set(tmp_path / "x", *[100] * 20)
    check_splits(arguments(data_path=[prefix], split="90,5,5"))
    with pytest.raises(ValueError, match=r"valid part of --split 98,1,1\) has 0 tokens"):
        check_splits(arguments(data_path=[prefix], split="98,1,1"))
    check_splits(arguments(data_path=[prefix], split="98,1,1", eval_iters=0))


@pytest.mark.parametrize("split", [None, "100,0,0"])
def test_no_validation_set(split: str | None, tmp_path: Path) -> None:
    prefix = make_set(tmp_path / "x", 100)
    named = {"data_path": [prefix], "split": split} if split else {"train_data_path": [prefix]}
    with pytest.raises(ValueError, match=r"--eval-iters 8, and there is no validation set.*Remedy"):
        check_splits(arguments(**named))
    check_splits(arguments(**named, eval_iters=0))
    check_splits(arguments(mock_data=True))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_that_is_missing(suffix: str, tmp_path: Path) -> None:
    good, other = make_set(tmp_path / "good", 65), make_set(tmp_path / "validation", 65)
    (tmp_path / f"validation.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"there is no .*validation\.{suffix}\. Remedy"):
        check_splits(arguments(train_data_path=[good], valid_data_path=[other]))


@pytest.mark.parametrize(
    "content", [b"", b"MMIDIDX", b"MMIDIDX\0\0", b"no index at all, really", None]
)
def test_a_damaged_index(content: bytes | None, tmp_path: Path) -> None:
    source = Source("--valid-data-path x", make_set(tmp_path / "x", 65, 70))
    file = tmp_path / "x.idx"
    file.write_bytes(file.read_bytes()[:40] if content is None else content)
    with pytest.raises(ValueError, match=r"--valid-data-path x: .*x\.idx is damaged"):
        source.num_tokens()


def test_an_evaluation_that_reads_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, valid = make_set(tmp_path / "t", 65), make_set(tmp_path / "v", 64 * 8 + 1)
    check_splits(arguments(train_data_path=[train], valid_data_path=[valid], eval_iters=2))
    assert capsys.readouterr().out == ""
    check_splits(arguments(train_data_path=[train], valid_data_path=[valid], eval_iters=3))
    assert "reads 12 sequences (--eval-iters 3)" in (shown := capsys.readouterr().out)
    assert "the validation set has 8" in shown


def test_blends_without_weights_are_read_once(tmp_path: Path) -> None:
    a, b = make_set(tmp_path / "a", 64 * 3 + 1), make_set(tmp_path / "b", 64 * 5 + 1)
    for paths in ([a, b], [a], ["1", a, "1", b]):
        check_unweighted(arguments(train_data_path=paths, eval_iters=0), [8, 0, 0])
    with pytest.raises(ValueError, match=r"have 8 sequences, .* the run reads 9\. Remedy: weights"):
        check_unweighted(arguments(train_data_path=[a, b], eval_iters=0), [9, 0, 0])
    check_unweighted(arguments(train_data_path=["1", a, "1", b], eval_iters=0), [9, 0, 0])
    check_unweighted(arguments(train_data_path=[a], eval_iters=0), [9, 0, 0])
    with pytest.raises(ValueError, match="--valid-data-path"):
        check_unweighted(arguments(train_data_path=[a], valid_data_path=[a, b]), [9, 9, 0])
