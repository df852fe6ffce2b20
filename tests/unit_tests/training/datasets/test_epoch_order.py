"""The order of the data does not depend on the length of the run."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit_tests.indexed_data import write_dataset
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402

from trinity_megatron.errors import UserError  # noqa: E402
from trinity_megatron.training.datasets.epoch_order import (  # noqa: E402
    EpochOrderConfig,
    EpochOrderGPTDataset,
    EpochOrderMockGPTDataset,
    check_is_long_enough,
    draw_index,
)

TOKENIZER = SimpleNamespace(vocab_size=10**6, eod=0, unique_identifiers={"name": "test"})
Order = list[tuple[int, ...]]


def corpus(seed: int) -> tuple[np.ndarray, int]:
    """Random documents, some of them empty, and a sequence length, which may be above them all."""
    generator = np.random.RandomState(seed)
    lengths = generator.randint(0 if seed % 3 == 0 else 1, 50, size=generator.randint(2, 40))
    lengths[0] += 2
    return lengths, int(generator.randint(2, 70))


def build(
    kind: type[GPTDataset], cache: Path, sizes: tuple[int, int, int], seq_length: int, **data: Any
) -> list[Any]:
    common = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    config_type = EpochOrderConfig if kind is not GPTDataset else GPTDatasetConfig
    config = config_type(
        random_seed=data.pop("seed", 5),
        sequence_length=seq_length,
        tokenizer=TOKENIZER,
        path_to_cache=str(cache),
        create_attention_mask=False,
        **common,
        **data,
    )
    return BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()


def read(dataset: Any, count: int) -> Order:
    return [tuple(dataset[index]["tokens"].tolist()) for index in range(count)]


@pytest.mark.parametrize("seed", range(1, 9))
def test_one_epoch_is_megatrons(seed: int, tmp_path: Path) -> None:
    lengths, seq_length = corpus(seed)
    data = write_dataset(tmp_path / "data", lengths)
    in_epoch = int(sum(lengths) - 1) // seq_length
    orders = []
    for kind in (GPTDataset, EpochOrderGPTDataset):
        blend = ([str(data)], None)
        (train, _, _) = build(
            kind, tmp_path / kind.__name__, (in_epoch, 0, 0), seq_length, blend=blend, split="1,0,0"
        )
        assert len(train) == in_epoch
        orders.append(read(train, in_epoch))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("seed", range(40))
def test_a_shorter_order_is_the_beginning_of_a_longer_one(seed: int) -> None:
    lengths, seq_length = corpus(seed)
    documents = np.flatnonzero(np.random.RandomState(seed).rand(len(lengths)) < 0.7)
    documents = np.union1d(documents, [0]).astype(np.int32)
    orders = [
        draw_index(documents, np.int32(lengths), seq_length=seq_length, num_epochs=n, seed=seed + 1)
        for n in (1, 2, 3, 7)
    ]
    longest = orders[-1]
    for stream, samples, shuffle in orders:
        assert len(samples) == len(shuffle) + 1
        assert sorted(shuffle) == list(range(len(shuffle)))
        for short, long in zip((stream, samples, shuffle), longest, strict=True):
            np.testing.assert_array_equal(short, long[: len(short)])


@pytest.mark.parametrize("seed", range(12))
def test_each_epoch_reads_each_token_once(seed: int, tmp_path: Path) -> None:
    lengths, seq_length = corpus(seed)
    total = int(sum(lengths))
    data = write_dataset(tmp_path / "data", lengths)
    ends = [(epoch * total - 1) // seq_length for epoch in range(1, 5)]
    (train, _, _) = build(
        EpochOrderGPTDataset,
        tmp_path / "cache",
        (max(1, ends[-1]), 0, 0),
        seq_length,
        blend=([str(data)], None),
        split="1,0,0",
    )
    seen: Counter[int] = Counter()
    orders = []
    for epoch, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
        sequences = [tuple(train[index]["tokens"].tolist()) for index in range(start, end)]
        seen.update(token for sequence in sequences for token in sequence)
        orders.append(sequences)
        # What is left of an epoch begins the first sequence of the next one.
        assert set(seen) <= set(range(1, total + 1))
        counts = [seen[token] for token in range(1, total + 1)]
        assert sum(counts) == end * seq_length > epoch * total - 1 - seq_length
        assert max(counts) <= epoch + 1 and sum(count > epoch for count in counts) <= seq_length
        assert sum(epoch - count for count in counts if count < epoch) <= 2 * seq_length
    if ends[0] > 3:
        assert orders[0] != orders[1] != orders[2]


# Blends: what Megatron is given, with the two datasets a and b.
@pytest.mark.parametrize(
    "blend",
    [
        {"blend": (["a"], None), "split": "90,10,0"},
        {"blend": (["a", "b"], [0.3, 0.7]), "split": "80,15,5"},
        {"blend": (["a", "b", "a"], [5.0, 1.0, 2.0]), "split": "1,0,0"},
        {"blend_per_split": [(["a"], None), (["b"], None), None]},
        {"blend_per_split": [(["a", "b"], [1.0, 9.0]), (["b", "a"], [0.5, 0.5]), None]},
        {"blend_per_split": [(["a", "b"], None), (["b"], None), None]},
    ],
)
def test_blends(blend: dict[str, Any], tmp_path: Path) -> None:
    generator = np.random.RandomState(1)
    for name, count, first in (("a", 60, 1), ("b", 25, 100_000)):
        write_dataset(tmp_path / name, generator.randint(1, 60, size=count), first)

    def put(item: Any) -> Any:
        if isinstance(item, str):
            return str(tmp_path / item) if item in ("a", "b") else item
        return type(item)(map(put, item)) if isinstance(item, list | tuple) else item

    given = {name: put(value) for name, value in blend.items()}
    sizes = [(7, 3, 2), (40, 9, 2), (100, 30, 2), (1000, 260, 2)]
    orders = []
    for size in sizes:
        made = build(EpochOrderGPTDataset, tmp_path / "cache", size, 16, **given)
        orders.append(
            [
                read(part, min(count, len(part))) if part is not None else []
                for part, count in zip(made, size, strict=True)
            ]
        )
    for short in orders:
        for one, longest in zip(short, orders[-1], strict=True):
            assert one == longest[: len(one)]
    assert len(orders[0][0]) == 7


def test_mock_data(tmp_path: Path) -> None:
    # 3 epochs of Megatron's made-up documents.
    short, long = (
        build(EpochOrderMockGPTDataset, tmp_path, (count, 1, 1), 10**6)[0] for count in (100, 300)
    )
    assert len(short) < len(long)
    np.testing.assert_array_equal(short.shuffle_index, long.shuffle_index[: len(short)])
    np.testing.assert_array_equal(
        short.document_index, long.document_index[: len(short.document_index)]
    )


def test_the_index_is_named_by_the_content(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def make(name: str, content: str) -> tuple[set[Path], Order]:
        (train, _, _) = build(
            EpochOrderGPTDataset,
            cache,
            (12, 0, 0),
            8,
            blend=([str(tmp_path / name)], None),
            split="1,0,0",
            fingerprints={str(tmp_path / name): content},
        )
        return set(cache.glob("*.npy")), read(train, 12)

    for name in ("one", "moved"):
        write_dataset(tmp_path / name, [20] * 6)
    files, order = make("one", "first")
    times = {path: path.stat().st_mtime_ns for path in files}
    assert make("moved", "first") == (files, order)
    assert {path: path.stat().st_mtime_ns for path in files} == times

    write_dataset(tmp_path / "one", [50] * 9)  # anew, under its old path
    more, other = make("one", "second")
    assert len(more) == 2 * len(files)
    assert max(max(sequence) for sequence in other) > 120
    assert not list(cache.glob("*.tmp"))


def test_a_blend_without_weights_must_be_long_enough(tmp_path: Path) -> None:
    for name, first in (("a", 1), ("b", 1000)):
        write_dataset(tmp_path / name, [41] * 4, first)
    paths = [str(tmp_path / name) for name in ("a", "b")]

    def train(count: int, weights: list[float] | None) -> Any:
        blend = {"blend": (paths, weights), "split": "1,0,0"}
        return build(EpochOrderGPTDataset, tmp_path / "cache", (count, 0, 0), 8, **blend)[0]

    for count, weights in ((40, None), (500, [0.5, 0.5])):
        check_is_long_enough(train(count, weights), count)
    check_is_long_enough(None, 500)
    with pytest.raises(ValueError, match="reads 500 sequences, .* has 40 .*Remedy: a weight"):
        check_is_long_enough(train(500, None), 500)


def test_a_negative_length_is_refused() -> None:
    lengths = np.int32([100, -50, 100])
    with pytest.raises(UserError, match="a document has -50 tokens"):
        draw_index(np.int32([0, 1, 2]), lengths, seq_length=10, num_epochs=1, seed=1)
