"""A run that is made longer, over several epochs, reads what a run of that length reads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.functional_tests.launch import Job, Logs, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# A rate that does not depend on the length.
STEADY = "--lr-decay-style constant --lr-warmup-fraction 0 --eval-iters 1 --eval-interval 3"


def shorten(prefix: Path, target: Path, count: int, first: int = 0) -> Path:
    """The beginnings of some documents of a dataset, from the first on: 48 tokens of each."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    source = IndexedDataset(str(prefix), mmap=True)
    builder = IndexedDatasetBuilder(f"{target}.bin", dtype=source.index.dtype)
    for index in range(first, first + count):
        tokens = source[index % len(source)][index : index + 48]
        builder.add_document(torch.from_numpy(tokens.astype("int64")), [len(tokens)])
    builder.finalize(f"{target}.idx")
    return target


@pytest.fixture(scope="module")
def logs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Logs:
    folder = tmp_path_factory.mktemp("longer")
    # 22 sequences of 64 tokens, and steps of 8; 5 for validation, and 8 an evaluation.
    shorten(data / "train", folder / "t", 30)
    shorten(data / "validation", folder / "v", 7)
    flags = f"{STEADY} --train-data-path {folder / 't'} --valid-data-path {folder / 'v'}"
    kept = folder / "checkpoints"
    jobs = [
        Job("whole", f"{flags} --train-iters 13"),
        Job("parts", f"{flags} --train-iters 4", kept),
        Job("parts", f"{flags} --train-iters 7", kept),
        Job("parts", f"{flags} --train-iters 13", kept),
    ]
    on_two = f"{flags} --train-iters 16 --load {kept} --ckpt-step 4"
    return train(data, folder, [(1, jobs), (2, [Job("on_two", on_two)])])


def test_training_and_validation_read_the_same(logs: Logs) -> None:
    for tag, steps in (("lm loss", range(1, 14)), ("lm loss validation", (3, 6, 9, 12, 13))):
        whole, parts = logs["whole"].scalars(tag), logs["parts"].scalars(tag)
        parts = {step: parts[step] for step in steps}
        assert {step: whole[step] for step in steps} == parts
    # Every batch is another one: the loss of the untrained model says which.
    assert len(set(logs["whole"].scalars("lm loss").values())) == 13


def test_the_order_is_that_of_one_rank(logs: Logs) -> None:
    one, two = logs["whole"].scalars("lm loss"), logs["on_two"].scalars("lm loss")
    steps = range(5, 14)
    np.testing.assert_allclose([two[s] for s in steps], [one[s] for s in steps], rtol=2e-5)
