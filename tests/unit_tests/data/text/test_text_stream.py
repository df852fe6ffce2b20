"""The samples of raw text are those of an oracle, also after a stop."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.reference.text_order import (
    Buffer,
    Encode,
    cut_lines,
    deal_rows,
    documents_of,
    make_encoder,
    pack,
)
from tests.unit_tests.data.text.conftest import make_texts, write_lines
from trinity_megatron.data.corpus import Document, ReadOptions, find_files, read_documents
from trinity_megatron.data.mixture.schedule import MixtureSchedule
from trinity_megatron.data.text.buffered_stream import make_stream
from trinity_megatron.data.text.packed_state import pack_documents, unpack_documents
from trinity_megatron.data.text.text_corpus import TextCorpus, find_text
from trinity_megatron.data.text.text_mixture import TextEncoder, TextMixture
from trinity_megatron.data.text.text_stream import TextStream
from trinity_megatron.data.text.token_parts import TokenCorpus
from trinity_megatron.errors import UserError

SEQ_LENGTH, STREAMS, SEED, DOCUMENTS, PHASE = 64, 4, 5, 6, 120
PART = 2**16


@pytest.fixture(scope="module")
def folder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_lines(folder / "web/a.jsonl", make_texts(400, 900, 1))
    write_lines(folder / "web/b.jsonl", make_texts(300, 900, 2))
    write_lines(folder / "code/c.jsonl.gz", make_texts(150, 3000, 3))
    write_tokens(folder / "tokens/code", tokenizer)
    return folder


def write_tokens(prefix: Path, tokenizer: Path) -> None:
    """The texts of the corpus ``code`` as a dataset of Megatron."""
    prefix.parent.mkdir(exist_ok=True)
    builder, encode = (
        IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16),
        make_encoder(tokenizer),
    )
    for text in make_texts(150, 3000, 3):
        tokens = torch.tensor(encode(text))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="module")
def encode(tokenizer: Path) -> Encode:
    return make_encoder(tokenizer)


def make_mixture(
    folder: Path, tokenizer: Path, order: str, *, is_prepared: bool = False
) -> TextMixture:
    corpora: list[TextCorpus | TokenCorpus] = [
        find_text(folder / name, name=name, key=f"corpora.{name}", options=ReadOptions())
        for name in ("web", "code")
    ]
    if is_prepared:
        prefix = folder / "tokens/code"
        size = Path(f"{prefix}.bin").stat().st_size
        corpora[1] = TokenCorpus("code", "corpora.code", prefix, 150, size)
    parts = ({0: 2, 1: 1}, {1: 1})
    phases = [(0, {0: Fraction(2, 3), 1: Fraction(1, 3)}), (PHASE, {1: Fraction(1)})]
    return TextMixture(
        corpora=corpora,
        starts=(0, PHASE),
        parts=parts,
        order=order,
        documents=DOCUMENTS,
        num_streams=STREAMS,
        seed=SEED,
        seq_length=SEQ_LENGTH,
        tokenizer=tokenizer,
        schedule=MixtureSchedule(phases, num_corpora=2, seed=SEED),
    )


def feeds(
    folder: Path, stream: int, shuffled: bool, is_prepared: bool = False
) -> dict[str, Iterator[str]]:
    parts = {
        "web": [part for n in "ab" for part in cut_lines(folder / f"web/{n}.jsonl", PART, 2)],
        "code": deal_rows(make_texts(150, 3000, 3), STREAMS),
    }
    assert len(parts["web"]) > 2 * STREAMS
    if is_prepared:  # ranges of documents, of at least 64 KiB but one for each stream
        texts = make_texts(150, 3000, 3)
        size = Path(folder / "tokens/code.bin").stat().st_size
        count = max(STREAMS, -(-size // PART))
        bounds = [150 * part // count for part in range(count + 1)]
        parts["code"] = [texts[one:end] for one, end in itertools.pairwise(bounds)]
    return {
        name: documents_of(
            name, of_corpus, seed=SEED, stream=stream, streams=STREAMS, shuffled=shuffled
        )
        for name, of_corpus in parts.items()
    }


def tokens_of(stream: TextStream) -> list[int]:
    pieces = stream.next()
    made = [token for piece in pieces for token in piece.tokens[: piece.length].tolist()]
    assert len(made) == SEQ_LENGTH
    return made


@pytest.mark.parametrize(("stream", "is_prepared"), [(0, False), (3, False), (1, True)])
def test_the_buffer_is_the_oracle_s(
    folder: Path, tokenizer: Path, encode: Encode, stream: int, is_prepared: bool
) -> None:
    mixture = make_mixture(folder, tokenizer, "rsdb", is_prepared=is_prepared)
    oracle = Buffer(
        feeds(folder, stream, True, is_prepared),
        [{"web": 2, "code": 1}, {"code": 1}],
        lambda sample: int(sample >= PHASE),
        encode,
        documents=DOCUMENTS,
        seed=SEED,
        stream=stream,
        streams=STREAMS,
        prepared=("code",) * is_prepared,
    )
    encoder = TextEncoder(tokenizer)
    made = make_stream(mixture, stream, encoder)
    for turn in range(400):
        assert tokens_of(made) == oracle.sequence(SEQ_LENGTH), turn
        if turn % 37 == 5 or turn in (29, 30, 31):  # around the new phase
            state = unpack_documents(pack_documents(made.state()))
            made = make_stream(mixture, stream, encoder)
            made.load(state)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_the_sequential_order_is_the_oracle_s(
    folder: Path, tokenizer: Path, encode: Encode, is_prepared: bool
) -> None:
    mixture = make_mixture(folder, tokenizer, "sequential", is_prepared=is_prepared)
    encoder = TextEncoder(tokenizer)
    assert mixture.schedule is not None
    for stream in range(STREAMS):
        texts = feeds(folder, stream, False, is_prepared)
        packed = {name: pack(of, encode) for name, of in texts.items()}
        made = make_stream(mixture, stream, encoder)
        for turn in range(60):
            corpus = int(mixture.schedule.locate(np.array([stream + turn * STREAMS]))[0][0])
            expected = list(islice(packed[mixture.names[corpus]], SEQ_LENGTH))
            assert tokens_of(made) == expected
            if turn % 13 == 5:
                state = made.state()
                made = make_stream(mixture, stream, encoder)
                made.load(state)


def test_a_corpus_whose_first_document_is_open_is_still_named(
    folder: Path, tokenizer: Path
) -> None:
    mixture = make_mixture(folder, tokenizer, "sequential")
    encoder = TextEncoder(tokenizer)
    state = make_stream(mixture, 0, encoder).state()
    state["heads"][0] = 7  # of the document at position 0
    state["names"] = ["another", "code"]
    with pytest.raises(ValueError, match="a corpus that the mixture does not name"):
        make_stream(mixture, 0, encoder).load(state)


def test_prepared_documents_that_have_changed(folder: Path, tokenizer: Path) -> None:
    mixture = make_mixture(folder, tokenizer, "rsdb", is_prepared=True)
    encoder = TextEncoder(tokenizer)
    stream = make_stream(mixture, 0, encoder)
    for _ in range(9):
        stream.next()
    state = stream.state()
    tokens = folder / "tokens/code.bin"
    before = tokens.read_bytes()
    tokens.write_bytes(bytes([before[0] ^ 1]) * len(before))
    try:
        with pytest.raises(UserError, match="corpora.code has changed since the checkpoint"):
            make_stream(make_mixture(folder, tokenizer, "rsdb", is_prepared=True), 0, encoder).load(
                state
            )
    finally:
        tokens.write_bytes(before)


def test_an_epoch_has_the_documents_that_prepare_data_reads(folder: Path, tokenizer: Path) -> None:
    mixture = make_mixture(folder, tokenizer, "rsdb")
    for corpus, name in enumerate(mixture.names):
        files, _ = find_files([folder / name])
        expected = [entry.text for entry in read_documents(files) if isinstance(entry, Document)]
        found = []
        for stream in range(STREAMS):
            reader = make_stream(mixture, stream, TextEncoder(tokenizer)).readers[corpus]
            while True:
                number, text = reader.next()
                if reader.epoch_of(number):
                    break
                found.append(text)
        assert sorted(found) == sorted(expected) and len(set(expected)) == len(expected)
