"""The loader of the buffers: samples, ranks, and the state beside a checkpoint."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit_tests.indexed_data import write_dataset
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.data.rsdb.virtual_stream import BufferedMixture, VirtualStream
from trinity_megatron.errors import UserError

enter_host()

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

from trinity_megatron.training.datasets.buffer_loader import (  # noqa: E402
    BufferedSamples,
    BufferLoader,
    ReadingRank,
)
from trinity_megatron.training.datasets.buffer_state import load_state, read_head  # noqa: E402

SEQ_LENGTH, STREAMS, PAD = 32, 8, 10**6


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[IndexedDataset]:
    folder = tmp_path_factory.mktemp("buffer")
    generator = np.random.default_rng(0)
    made = []
    for number, longest in enumerate((20, 150)):
        lengths = generator.integers(1, longest, 60).tolist()
        prefix = write_dataset(folder / str(number), lengths, first=20_000 * number + 1)
        made.append(IndexedDataset(str(prefix)))
    return made


def make_mixture(datasets: list[IndexedDataset]) -> BufferedMixture:
    return BufferedMixture(
        names=("a", "b"),
        lengths=[dataset.sequence_lengths for dataset in datasets],
        starts=(0, 100),
        parts=({0: 1, 1: 1}, {1: 1}),
        documents=4,
        num_streams=STREAMS,
        seed=3,
        seq_length=SEQ_LENGTH,
    )


def make_samples(datasets: list[IndexedDataset], **given: Any) -> BufferedSamples:
    values: dict[str, Any] = {
        "random_seed": 1,
        "sequence_length": SEQ_LENGTH,
        "blend_per_split": [(["a"], None), None, None],
        "tokenizer": SimpleNamespace(vocab_size=PAD, eod=0, pad=PAD),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    return BufferedSamples(datasets, GPTDatasetConfig(**{**values, **given}))


def make_loader(
    datasets: list[IndexedDataset], rank: int, size: int, micro_batch: int, consumed: int = 0
) -> BufferLoader:
    mixture, samples = make_mixture(datasets), make_samples(datasets)
    return BufferLoader(mixture, samples, ReadingRank(rank, size, micro_batch), consumed)


def test_a_sample_is_its_pieces(datasets: list[IndexedDataset]) -> None:
    samples = make_samples(datasets, inter_document_masking=True)
    stream = VirtualStream(make_mixture(datasets), 0)
    ended = 0
    for _ in range(80):
        pieces = stream.next()
        sample = samples.make(pieces)
        tokens = np.concatenate(
            [datasets[p.corpus][p.document][p.start : p.start + p.length] for p in pieces]
        )
        np.testing.assert_array_equal(sample["tokens"], tokens)
        np.testing.assert_array_equal(sample["labels"][:-1], tokens[1:])
        last = pieces[-1]
        if last.rest:
            # No token of a dataset comes twice: the label is the document's next one.
            assert sample["labels"][-1] == tokens[-1] + 1
            assert sample["loss_mask"].all()
        else:
            ended += 1
            assert sample["loss_mask"].tolist() == [1.0] * (SEQ_LENGTH - 1) + [0.0]
        bounds = np.cumsum([0] + [piece.length for piece in pieces])
        np.testing.assert_array_equal(sample["cu_seqlens"][: len(bounds)], bounds)
        assert (sample["cu_seqlens"][len(bounds) :] == SEQ_LENGTH).all()
        assert sample["max_seqlen"] == np.diff(bounds).max()
        starts = np.repeat(bounds[:-1], np.diff(bounds))
        np.testing.assert_array_equal(sample["position_ids"], np.arange(SEQ_LENGTH) - starts)
    assert 0 < ended < 80


def read(loaders: list[BufferLoader], turns: int) -> np.ndarray:
    """The sequences of all ranks in the order of the run."""
    return np.concatenate([next(loader)["tokens"] for _ in range(turns) for loader in loaders])


@pytest.mark.parametrize(("size", "micro_batch"), [(1, 2), (2, 1), (2, 2), (4, 2), (8, 1), (1, 8)])
def test_ranks_and_micro_batches_read_the_same(
    datasets: list[IndexedDataset], size: int, micro_batch: int
) -> None:
    expected = read([make_loader(datasets, 0, 1, 1)], 160)
    loaders = [make_loader(datasets, rank, size, micro_batch) for rank in range(size)]
    np.testing.assert_array_equal(read(loaders, 160 // (size * micro_batch)), expected)
    held = [number for loader in loaders for number in loader.streams]
    assert sorted(held) == list(range(STREAMS))


def save(loaders: list[BufferLoader], folder: Path, pipeline: str = "") -> None:
    """As Megatron's maybe_save_dataloader_state does."""
    path = folder / f"mp_rank_00{pipeline}"
    path.mkdir(parents=True)
    for rank, loader in enumerate(loaders):
        state = {"dataloader_state_dict": loader.save_state()}
        torch.save(state, path / f"train_dataloader_dprank{rank:03d}.pt")


def resume(loaders: list[BufferLoader], folder: Path, consumed: int) -> list[BufferLoader]:
    head = read_head(folder, Namespace(consumed_train_samples=consumed, allow_data_change=False))
    assert head is not None
    for loader in loaders:
        load_state(loader, folder, head)
    return loaders


@pytest.mark.parametrize("before", [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("after", [(1, 1), (2, 2), (4, 1), (4, 2)])
def test_other_ranks_go_on(
    datasets: list[IndexedDataset], tmp_path: Path, before: tuple, after: tuple
) -> None:
    expected = read([make_loader(datasets, 0, 1, 1)], 160)
    # 60 samples are no multiple of the eight that the last of them read at a time.
    size, micro_batch = before
    loaders = [make_loader(datasets, rank, size, micro_batch) for rank in range(size)]
    first = read(loaders, 60 // (size * micro_batch))
    save(loaders, tmp_path)
    size, micro_batch = after
    loaders = [make_loader(datasets, rank, size, micro_batch, 60) for rank in range(size)]
    second = read(resume(loaders, tmp_path, 60), 96 // (size * micro_batch))
    np.testing.assert_array_equal(np.concatenate([first, second]), expected[:156])


def test_a_state_that_does_not_fit_is_refused(
    datasets: list[IndexedDataset], tmp_path: Path
) -> None:
    loaders = [make_loader(datasets, rank, 2, 1) for rank in range(2)]
    read(loaders, 20)
    save(loaders, tmp_path, "_000")
    one = make_loader(datasets, 0, 1, 1, 40)
    with pytest.raises(UserError, match="of 40 consumed samples, and the checkpoint of 48"):
        resume([one], tmp_path, 48)
    one.mixture = replace(one.mixture, names=("a", "c"))
    one.streams = {number: VirtualStream(one.mixture, number) for number in one.streams}
    with pytest.raises(UserError, match="a corpus that the mixture does not name"):
        resume([one], tmp_path, 40)
    path = tmp_path / "mp_rank_00_000/train_dataloader_dprank001.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"dprank001\.pt is damaged"):
        resume([make_loader(datasets, 0, 1, 1, 40)], tmp_path, 40)
    path.unlink()
    with pytest.raises(UserError, match="lacks the state of data-parallel rank 1"):
        resume([make_loader(datasets, 0, 1, 1, 40)], tmp_path, 40)
    with pytest.raises(UserError, match="has no state of the streams"):
        resume([], tmp_path / "none", 40)
