"""The model of a mixture with raw text reads the oracle's list, however the run is stopped."""

import gzip
import itertools
import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.functional_tests.launch import Job, Logs, only_in_all, train
from tests.functional_tests.test_mixture import (
    LONG_ENDS,
    LONG_SAMPLES,
    SEED,
    SEQ_LENGTH,
    killed_ten_times,
    read_rows,
    train_until,
)
from tests.reference.mixture_order import turns
from tests.reference.text_order import (
    Buffer,
    Encode,
    cut_lines,
    deal_rows,
    documents_of,
    make_encoder,
    pack,
)
from trinity_megatron.data.manifest import load_manifest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STREAMS, DOCUMENTS, PHASE, STEPS = 8, 4, 30, 12
SAMPLES = 4 * 4 + 8 * 8  # 4 steps of 4 and 8 of 8
TEXT = """
corpora:
  web:  {{path: web}}
  code: {{path: code, text_key: meta.body}}
  notes: {{path: tokens/notes}}
phases:
  - {{until: {0}, weights: {{web: 0.7, code: 0.3}}}}
  - {{weights: {{code: 3, web: 1, notes: 2}}}}
tokenizer: {1}
order: rsdb
rsdb: {{documents: {2}, streams: {3}}}
"""
FLAGS = (
    "--lr-decay-style constant --lr-warmup-fraction 0 --eval-iters 0 --save-interval 2 "
    f"--step-batch-size-schedule 0:4,1K:8 --micro-batch-size 2 --train-iters {STEPS}"
)


def make_texts(count: int, first: int) -> list[str]:
    """Lines of this package's own source, cut into documents of some."""
    lines = (Path(__file__).parents[1] / "conftest.py").read_text().splitlines()
    lines += Path(__file__).read_text().splitlines()
    return [
        "\n".join([f"document {n}", *(lines[(7 * n + k) % len(lines)] for k in range(n % 17))])
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of lines, of which one is cut into parts, and compressed ones."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("web", "code"):
        (folder / name).mkdir()
    for name, first in (("a", 0), ("b", 1000)):
        rows = [json.dumps({"text": text}) for text in make_texts(400, first)]
        (folder / f"web/{name}.jsonl").write_text("\n".join(rows))
    rows = [json.dumps({"meta": {"body": text}}) for text in make_texts(150, 2000)]
    (folder / "code/c.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    tokenizer = load_manifest(data).tokenizer_path
    write_tokens(folder / "tokens/notes", make_encoder(tokenizer))
    text = TEXT.format(PHASE * SEQ_LENGTH, tokenizer, DOCUMENTS, STREAMS)
    (folder / "mix.yaml").write_text(text)
    return folder


def write_tokens(prefix: Path, encode: Encode) -> None:
    """A corpus that is prepared."""
    prefix.parent.mkdir()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for text in make_texts(200, 3000):
        tokens = encode(text)
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def feeds(folder: Path, stream: int, streams: int, *, shuffled: bool) -> dict[str, Iterator[str]]:
    """The documents of a stream by corpus."""
    web = [cut_lines(folder / f"web/{name}.jsonl", 2**16, streams // 2) for name in "ab"]
    parts = {"web": web[0] + web[1], "code": deal_rows(make_texts(150, 2000), streams)}
    notes = make_texts(200, 3000)  # of less than 64 KiB for each stream
    bounds = [200 * part // streams for part in range(streams + 1)]
    parts["notes"] = [notes[one:end] for one, end in itertools.pairwise(bounds)]
    return {
        name: documents_of(name, of, seed=SEED, stream=stream, streams=streams, shuffled=shuffled)
        for name, of in parts.items()
    }


def oracle(
    data: Path, folder: Path, starts: list[int], weights: list[dict[str, int]], samples: int
) -> np.ndarray:
    """The tokens of a run in order ``rsdb``, ``[samples, SEQ_LENGTH]``.

    Args:
        starts: The first sample of each phase.
        weights: Of each phase.
    """
    encode = make_encoder(load_manifest(data).tokenizer_path)
    buffers = [
        Buffer(
            feeds(folder, stream, STREAMS, shuffled=True),
            weights,
            lambda sample: bisect_right(starts, sample) - 1,
            encode,
            documents=DOCUMENTS,
            seed=SEED,
            stream=stream,
            streams=STREAMS,
            prepared=("notes",),
        )
        for stream in range(STREAMS)
    ]
    return np.array([buffers[n % STREAMS].sequence(SEQ_LENGTH) for n in range(samples)])


def sequential_oracle(
    data: Path, folder: Path, starts: list[int], weights: list[dict[str, int]], samples: int
) -> np.ndarray:
    """As ``oracle``, in order ``sequential``, whose streams are as many as the smallest batch."""
    encode = make_encoder(load_manifest(data).tokenizer_path)
    packed = [
        {name: pack(of, encode) for name, of in feeds(folder, n, 4, shuffled=False).items()}
        for n in range(4)
    ]
    corpora: list[str] = []
    for phase, (start, end) in enumerate(itertools.pairwise([*starts, samples])):
        corpora += itertools.islice(turns(weights[phase], SEED, phase), end - start)
    return np.array(
        [
            list(itertools.islice(packed[sample % 4][name], SEQ_LENGTH))
            for sample, name in enumerate(corpora)
        ]
    )


@pytest.fixture(scope="module")
def expected(data: Path, folder: Path) -> np.ndarray:
    """The tokens of the run by an oracle, ``[samples, seq_length]``."""
    weights = [{"web": 7, "code": 3}, {"code": 3, "web": 1, "notes": 2}]
    return oracle(data, folder, [0, PHASE], weights, SAMPLES)


def job(folder: Path, name: str, more: str) -> Job:
    probe = {"tokens": str(folder / f"{name}.tokens")}
    flags = f"{FLAGS} --data {folder / 'mix.yaml'} {more}"
    return Job(name, flags, folder / "checkpoints", probe)


@pytest.fixture(scope="module")
def logs(data: Path, folder: Path) -> Logs:
    """A run of one rank and three workers that is killed, and what goes on from its checkpoint."""
    killed = job(folder, "killed", "--num-workers 3")
    train_until(data, folder, killed, 1, 8)
    resumed = "--ckpt-step 6 --save-interval 100 --num-workers"
    two = [job(folder, f"on_two_{n}", f"{resumed} {n}") for n in (0, 1, 3)]
    return train(data, folder, [(2, two)])


def test_a_killed_run_goes_on(logs: Logs, folder: Path, expected: np.ndarray) -> None:
    assert logs
    before = read_rows(folder / "killed.tokens", 1, 2)
    assert sorted(before)[:7] == list(range(1, 8))
    read = np.concatenate([before[step] for step in range(1, 8)])
    np.testing.assert_array_equal(read, expected[: len(read)])
    for workers in (0, 1, 3):
        steps = read_rows(folder / f"on_two_{workers}.tokens", 2, 2)
        assert sorted(steps) == list(range(7, STEPS + 1))
        tokens = np.concatenate([steps[step] for step in sorted(steps)])
        np.testing.assert_array_equal(tokens, expected[-len(tokens) :])


def test_workers_change_no_loss(logs: Logs) -> None:
    losses = [logs[f"on_two_{workers}"].scalars("lm loss") for workers in (0, 1, 3)]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) >= 6


CORPORA = TEXT[: TEXT.index("phases:")].format(*[""] * 4)
LONG = """phases:
  - {{until: {0}, weights: {{web: 0.7, code: 0.3}}}}
  - {{until: {1}, weights: {{web: 0.25, notes: 0.25, code: 0.5}}}}
  - {{weights: {{notes: 3, code: 1}}}}
tokenizer: {2}
order: {3}
"""
WEIGHTS = [{"web": 7, "code": 3}, {"web": 1, "notes": 1, "code": 2}, {"notes": 3, "code": 1}]
ORACLES = {"rsdb": oracle, "sequential": sequential_oracle}


@only_in_all
@pytest.mark.parametrize("order", ORACLES)
def test_ten_kills_change_nothing(order: str, data: Path, folder: Path, tmp_path: Path) -> None:
    """SIGKILL at random steps; then 1, 2 or 4 ranks go on with 0, 1 or 3 workers."""
    mixture = folder / f"long_{order}.yaml"
    text = LONG.format(*LONG_ENDS, load_manifest(data).tokenizer_path, order)
    if order == "rsdb":
        text += f"rsdb: {{documents: {DOCUMENTS}, streams: {STREAMS}}}\n"
    mixture.write_text(CORPORA + text)
    steady = "--lr-decay-style constant --lr-warmup-fraction 0 --eval-iters 0"
    tokens = killed_ten_times(data, tmp_path, f"{steady} --data {mixture}")
    starts = [0, *(-(-end // SEQ_LENGTH) for end in LONG_ENDS)]
    expected = ORACLES[order](data, folder, starts, WEIGHTS, LONG_SAMPLES)
    np.testing.assert_array_equal(tokens, expected)
