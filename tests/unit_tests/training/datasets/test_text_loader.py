"""The loader of raw text: ranks, workers, and the state beside a checkpoint."""

import json
import random
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.text_order import make_encoder
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.data.formats import ReadOptions
from trinity_megatron.data.text.text_corpus import find_text
from trinity_megatron.data.text.text_mixture import TextMixture
from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from trinity_megatron.errors import UserError

enter_host()

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig  # noqa: E402

from trinity_megatron.training.datasets.buffer_state import load_state, read_head  # noqa: E402
from trinity_megatron.training.datasets.stream_loader import (  # noqa: E402
    PackedSamples,
    ReadingRank,
)
from trinity_megatron.training.datasets.text_loader import TextLoader  # noqa: E402
from trinity_megatron.training.datasets.texts import contents_of  # noqa: E402

SEQ_LENGTH, STREAMS, PAD = 32, 8, 10**6


def make_texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [
        f"{seed}:{number} " + "".join(generator.choices("abcde fgh", k=generator.randrange(300)))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("web", 1), ("code", 2)):
        (folder / name).mkdir()
        for part in range(3):
            rows = [json.dumps({"text": text}) for text in make_texts(60, 10 * seed + part)]
            (folder / name / f"{part}.jsonl").write_text("\n".join(rows))
    save_tokenizer(train_tokenizer(make_texts(60, 3), vocab_size=300), folder / "tokenizer")
    return folder


def make_mixture(folder: Path) -> TextMixture:
    names = ("web", "code")
    return TextMixture(
        corpora=[
            find_text(folder / name, name=name, key=name, options=ReadOptions()) for name in names
        ],
        starts=(0,),
        parts=({0: 2, 1: 1},),
        order="rsdb",
        documents=4,
        num_streams=STREAMS,
        seed=3,
        seq_length=SEQ_LENGTH,
        tokenizer=folder / "tokenizer",
    )


def make_samples(**given: Any) -> PackedSamples:
    values: dict[str, Any] = {
        "random_seed": 1,
        "sequence_length": SEQ_LENGTH,
        "tokenizer": SimpleNamespace(vocab_size=PAD, eod=0, pad=PAD),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    return PackedSamples(GPTDatasetConfig(**{**values, **given}))


def make_loaders(
    folder: Path, size: int, micro_batch: int, workers: int, consumed: int = 0
) -> list[TextLoader]:
    mixture = make_mixture(folder)
    return [
        TextLoader(mixture, make_samples(), ReadingRank(rank, size, micro_batch), consumed, workers)
        for rank in range(size)
    ]


def read(loaders: list[TextLoader], samples: int) -> np.ndarray:
    """So many sequences of all ranks in the order of the run."""
    turns = samples // loaders[0].rank.at_a_time
    return np.concatenate([next(loader)["tokens"] for _ in range(turns) for loader in loaders])


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return read(make_loaders(folder, 1, 1, 0), 120)


def save(loaders: list[TextLoader], folder: Path) -> None:
    """As Megatron's maybe_save_dataloader_state does."""
    path = folder / "mp_rank_00"
    path.mkdir(parents=True)
    for rank, loader in enumerate(loaders):
        state = {"dataloader_state_dict": loader.save_state()}
        torch.save(state, path / f"train_dataloader_dprank{rank:03d}.pt")


def resume(loaders: list[TextLoader], folder: Path, consumed: int) -> list[TextLoader]:
    contents = contents_of(loaders[0].mixture.corpora, "rsdb")
    args = Namespace(consumed_train_samples=consumed, allow_data_change=False)
    head = read_head(folder, args, contents)
    assert head is not None
    for loader in loaders:
        load_state(loader, folder, head)
    return loaders


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 1, 0), (2, 2, 1)),
        ((2, 2, 3), (1, 4, 0)),
        ((4, 1, 1), (2, 1, 3)),
    ],
)
def test_other_ranks_and_workers_go_on(
    folder: Path, expected: np.ndarray, tmp_path: Path, before: tuple, after: tuple
) -> None:
    torch.manual_seed(7)
    loaders = make_loaders(folder, *before)
    first = read(loaders, 60)  # no multiple of the streams
    save(loaders, tmp_path)
    second = read(resume(make_loaders(folder, *after, 60), tmp_path, 60), 56)
    np.testing.assert_array_equal(np.concatenate([first, second]), expected[:116])
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert drawn == torch.rand(1)  # the training's numbers are its own


def test_a_state_before_the_first_sample(
    folder: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    loaders = make_loaders(folder, 1, 2, 0)
    read(loaders, 4)  # half of the streams have not begun
    save(loaders, tmp_path)
    rest = read(resume(make_loaders(folder, 2, 1, 0, 4), tmp_path, 4), 40)
    np.testing.assert_array_equal(rest, expected[4:44])


def test_labels_and_document_bounds(folder: Path) -> None:
    mixture = make_mixture(folder)
    loader = TextLoader(
        mixture, make_samples(inter_document_masking=True), ReadingRank(0, 1, 1), 0, 0
    )
    encode = make_encoder(folder / "tokenizer")
    eod = encode("")[0]
    ended = 0
    for _ in range(80):
        sample = {name: value[0] for name, value in next(loader).items()}
        tokens, labels = sample["tokens"], sample["labels"]
        assert torch.equal(tokens[1:], labels[:-1])
        ends = (torch.nonzero(tokens == eod).flatten() + 1).tolist()
        # A document begins behind each end of one; one that filled a sequence may go on later.
        bounds = sample["cu_seqlens"].tolist()
        assert set(ends) <= set(bounds)
        if tokens[-1] == eod:
            ended += 1
            assert sample["loss_mask"].tolist() == [1.0] * (SEQ_LENGTH - 1) + [0.0]
        else:
            assert sample["loss_mask"].all() and labels[-1] != PAD
    assert ended


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_one_clear_error(folder: Path, tmp_path: Path, workers: int) -> None:
    rows = [json.dumps({"text": text}) for text in make_texts(40, 5)]
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.jsonl").write_text("\n".join([*rows, '{"text": 1}']))
    mixture = make_mixture(folder)
    corpus = find_text(tmp_path / "web", name="web", key="corpora.web", options=ReadOptions())
    mixture = replace(mixture, corpora=[corpus], parts=({0: 1},), num_streams=2)
    loader = TextLoader(mixture, make_samples(), ReadingRank(0, 1, 1), 0, workers)
    with pytest.raises(UserError) as error:
        for _ in range(500):
            next(loader)
    message = str(error.value)
    assert message.startswith(f"corpora.web: {tmp_path}/web/a.jsonl, line 41: 'text' is int")
    assert "Remedy" in message and "Traceback" not in message and "\n" not in message


def test_text_that_has_changed(folder: Path, tmp_path: Path) -> None:
    for name in ("web", "code", "tokenizer"):
        (tmp_path / name).mkdir()
        for path in (folder / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    loaders = make_loaders(tmp_path, 1, 1, 0)
    read(loaders, 40)
    save(loaders, tmp_path / "state")
    for path in (tmp_path / "web").iterdir():
        path.write_text(path.read_text().replace("a", "b"))
    changed = make_loaders(tmp_path, 1, 1, 0, 40)
    with pytest.raises(UserError, match="web has changed since the checkpoint"):
        read(resume(changed, tmp_path / "state", 40), 8)
    args = Namespace(consumed_train_samples=40, allow_data_change=True)
    corpora = loaders[0].mixture.corpora
    for contents, goes_on in (
        (contents_of(changed[0].mixture.corpora, "rsdb"), False),
        (contents_of(corpora, "sequential"), False),
        (None, False),
        (contents_of(corpora, "rsdb"), True),
    ):
        head = read_head(tmp_path / "state", args, contents)
        assert (head is not None) == goes_on


def test_a_state_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    loaders = make_loaders(folder, 1, 1, 0)
    read(loaders, 40)
    save(loaders, tmp_path)
    mixture = make_mixture(folder)
    for given, words in (
        ({"corpora": mixture.corpora[:1], "parts": ({0: 1},)}, "does not name code"),
        ({"documents": 1}, "more documents than rsdb.documents"),
    ):
        other = replace(mixture, **given)  # type: ignore[arg-type]
        loader = TextLoader(other, make_samples(), ReadingRank(0, 1, 1), 40, 0)
        with pytest.raises(UserError, match=words):
            resume([loader], tmp_path, 40)
