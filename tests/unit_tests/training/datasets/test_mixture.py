"""The datasets of a mixture against the oracle, and sequential order."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.reference.mixture_order import mixture_samples, read_documents
from tests.unit_tests.indexed_data import write_dataset
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.data.mixture.corpora import MixtureData
from trinity_megatron.data.mixture.mixture_file import load_mixture
from trinity_megatron.data.mixture.open_corpora import open_mixture

enter_host()

from trinity_megatron.training.datasets.epoch_order import EpochOrderConfig  # noqa: E402
from trinity_megatron.training.datasets.mixture import (  # noqa: E402
    build_training_set,
    build_validation_set,
)

SEQ_LENGTH, SEED, SAMPLES = 16, 7, 240
CORPORA = ("web", "news", "code", "late")
TEXT = """
corpora:
  web:  {path: web, language: english}
  news: {path: news, validation: news_valid}
  code: {path: code, validation: code_valid}
  late: {path: late}
phases:
  - {until: 1000, weights: {web: 0.7, code: 0.3}}
  - {until: 2560, weights: {web: 0.25, news: 0.25, code: 0.5}}
  - {until: 5K, weights: {news: 3, code: 1}}
  - {weights: {late: 1}}
tokenizer: tokenizer
"""
# A sample of 16 tokens begins at 992 and is of the first phase.
PHASES = [
    (1000, {"web": 7, "code": 3}),
    (2560, {"web": 1, "news": 1, "code": 2}),
    (5000, {"news": 3, "code": 1}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    names = (*CORPORA, "news_valid", "code_valid")
    for number, name in enumerate(names):
        write_dataset(
            folder / name, lengths[number : 30 + 3 * number].tolist(), 10_000 * number + 1
        )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    return folder


def opened(folder: Path, order: str = "shuffled") -> MixtureData:
    path = folder / f"{order}.yaml"
    path.write_text(f"{TEXT}order: {order}")
    return open_mixture(load_mixture(path))


def make_config(folder: Path) -> EpochOrderConfig:
    return EpochOrderConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend_per_split=[([str(folder / "web")], None), None, None],
        path_to_cache=str(folder / "cache"),
        tokenizer=SimpleNamespace(vocab_size=10**6, eod=0, pad=-1),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def test_every_token_is_the_oracle_s(folder: Path) -> None:
    made = build_training_set(opened(folder), make_config(folder), SAMPLES, lambda: True)
    assert made is not None and len(made) == SAMPLES
    expected = mixture_samples(
        {name: read_documents(folder / name) for name in CORPORA},
        PHASES,
        seq_length=SEQ_LENGTH,
        seed=SEED,
        samples=SAMPLES,
        epochs=8,
    )
    # Asked for out of order, as several workers do.
    for index in np.random.default_rng(1).permutation(SAMPLES).tolist():
        sample = made[index]
        np.testing.assert_array_equal(sample["tokens"], expected[index][:-1])
        np.testing.assert_array_equal(sample["labels"], expected[index][1:])
        assert expected[index][0] // 10_000 == sample["dataset_id"]
    assert made.datasets[3] is None  # the run ends before its phase


def test_a_longer_run_begins_with_the_same(folder: Path) -> None:
    runs = [
        build_training_set(opened(folder), make_config(folder), samples, lambda: True)
        for samples in (100, SAMPLES)
    ]
    for index in range(100):
        tokens = [run[index]["tokens"] for run in runs if run is not None]
        np.testing.assert_array_equal(*tokens)


def test_sequential_order_is_that_of_the_files(folder: Path) -> None:
    made = build_training_set(
        opened(folder, "sequential"), make_config(folder), SAMPLES, lambda: True
    )
    assert made is not None
    samples = [made[index] for index in range(SAMPLES)]
    for number, name in enumerate(CORPORA[:3]):
        tokens = [s["tokens"].numpy() for s in samples if s["dataset_id"] == number]
        stream = np.concatenate(read_documents(folder / name) * 8)
        read = np.concatenate(tokens)
        np.testing.assert_array_equal(read, stream[: len(read)])


def test_an_evaluation_has_all_domains(folder: Path) -> None:
    data, config = opened(folder), make_config(folder)
    prefixes = {name: item.validation for name, item in data.validated.items()}
    made = build_validation_set(data, config, 11, lambda: True, prefixes)
    assert made is not None and len(made) == 11
    samples = [made[index] for index in range(11)]
    assert [sample["dataset_id"] for sample in samples] == [1, 2] * 5 + [1]
    for sample in samples:
        place = {1: 4, 2: 5}[sample["dataset_id"]]  # in the numbers of the tokens
        assert sample["tokens"].min() // 10_000 == sample["tokens"].max() // 10_000 == place


def test_a_rank_that_reads_nothing(folder: Path) -> None:
    config = make_config(folder)
    assert build_training_set(opened(folder), config, SAMPLES, lambda: False) is None
    assert build_validation_set(opened(folder), config, 11, lambda: False, {}) is None
