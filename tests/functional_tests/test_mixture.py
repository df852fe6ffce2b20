"""What the model of a mixture reads is the oracle's list, however often the run is stopped."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.functional_tests.launch import Job, Logs, entry, environment, only_in_all, train
from tests.functional_tests.test_longer_run import shorten
from tests.reference.mixture_order import mixture_samples, read_documents
from trinity_megatron.data.mixture.open_corpora import read_mixture
from trinity_megatron.data.mixture.plan import phase_starts
from trinity_megatron.data.mixture.schedule import whole_parts
from trinity_megatron.data.rsdb.length_bias import LengthBias
from trinity_megatron.data.rsdb.virtual_stream import BufferedMixture, VirtualStream

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SEQ_LENGTH, SEED = 64, 11
ORDERS = {"shuffled": "shuffled", "rsdb": "rsdb\nrsdb: {documents: 4, streams: 8}"}
STEADY = (
    "--lr-decay-style constant --lr-warmup-fraction 0 --eval-iters 1 --eval-interval 6 "
    "--eval-global-batch-size 4"
)
TEXT = """
corpora:
  web:  {{path: web, language: english, validation: valid}}
  news: {{path: news, language: english, validation: valid2}}
  code: {{path: code, language: python}}
phases:
  - {{until: {0}, weights: {{web: 0.7, code: 0.3}}}}
  - {{until: {1}, weights: {{web: 0.25, news: 0.25, code: 0.5}}}}
  - {{weights: {{news: 3, code: 1}}}}
tokenizer: {2}
order: {3}
"""


def write(data: Path, folder: Path, ends: tuple[int, int], order: str = "shuffled") -> Path:
    """A mixture of three corpora of 40 to 120 sequences."""
    for name, first, count in (("web", 0, 60), ("news", 60, 45), ("code", 105, 90)):
        shorten(data / "train", folder / name, count, first)
    for name, first in (("valid", 0), ("valid2", 7)):
        shorten(data / "validation", folder / name, 7, first)
    path = folder / "mix.yaml"
    text = TEXT.format(*ends, data / "tokenizer", order)
    path.write_text(text if order == "shuffled" else biased(text))
    return path


def biased(text: str) -> str:
    """Longer documents of code are read more often."""
    bias = "length_bias: {floor: 0.3, ceiling: 0.9, tokens: 200}"
    return text.replace("language: python", f"language: python, {bias}")


def oracle(folder: Path, ends: tuple[int, int], samples: int) -> np.ndarray:
    """The tokens of the first samples, ``[samples, seq_length]``."""
    phases = [
        (ends[0], {"web": 7, "code": 3}),
        (ends[1], {"web": 1, "news": 1, "code": 2}),
        (2**62, {"news": 3, "code": 1}),
    ]
    corpora = {name: read_documents(folder / name) for name in ("web", "news", "code")}
    found = mixture_samples(
        corpora, phases, seq_length=SEQ_LENGTH, seed=SEED, samples=samples, epochs=30
    )
    return np.stack(found)[:, :-1]


def read_rows(
    prefix: Path, ranks: int, micro_batch: int, before: int = 2**31 - 1
) -> dict[int, np.ndarray]:
    """The sequences of each step in the order of the run.

    Args:
        prefix: Of ``worker.read_tokens``.
        ranks: That have read them.
        micro_batch: Sequences of one.
        before: The first step that is left out.
    """
    width = SEQ_LENGTH + 1
    read = [np.fromfile(f"{prefix}.{rank}", np.int32) for rank in range(ranks)]
    by_rank = [rows[: len(rows) // width * width].reshape(-1, width) for rows in read]
    steps: dict[int, np.ndarray] = {}
    for step in np.unique(by_rank[0][:, 0]).tolist():
        if step < before:
            parts = [rows[rows[:, 0] == step, 1:] for rows in by_rank]
            shaped = [part.reshape(-1, micro_batch, SEQ_LENGTH) for part in parts]
            steps[step] = np.stack(shaped, axis=1).reshape(-1, SEQ_LENGTH)
    return steps


ENDS = (850, 3000)  # sequences 14 and 47 are the first of their phases
STEPS = 12  # 4 of 4 and 8 of 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module")
def logs(data: Path, folder: Path) -> Logs:
    """A run of one rank in each order, and from its checkpoints on one rank and on two."""
    shuffled = write(data, folder, ENDS)
    buffers = folder / "rsdb.yaml"
    text = shuffled.read_text()
    buffers.write_text(biased(text.replace("order: shuffled", f"order: {ORDERS['rsdb']}")))
    flags = f"{STEADY} --step-batch-size-schedule 0:4,1K:8 --micro-batch-size 2"
    flags += f" --train-iters {STEPS} --data"

    def job(name: str, mixture: Path, more: str) -> Job:
        probe = {"tokens": str(folder / f"{name}.tokens")}
        return Job(name, f"{flags} {mixture} {more}", folder / mixture.stem, probe)

    one = [
        job("whole", shuffled, "--save-interval 3"),
        job("on_one", shuffled, "--ckpt-step 3 --num-workers 1"),
        job("buffers", buffers, "--save-interval 5"),
    ]
    two = [
        job("on_two", shuffled, "--ckpt-step 6"),
        job("buffers_on_two", buffers, "--ckpt-step 5"),
    ]
    return train(data, folder, [(1, one), (2, two)])


def test_the_model_reads_the_oracle_s_tokens(logs: Logs, folder: Path) -> None:
    assert logs
    expected = oracle(folder, ENDS, 4 * 4 + 8 * 8)
    for name, ranks, first in (("whole", 1, 1), ("on_one", 1, 4), ("on_two", 2, 7)):
        read = read_rows(folder / f"{name}.tokens", ranks, 2)
        assert sorted(read) == list(range(first, STEPS + 1))
        tokens = np.concatenate([read[step] for step in sorted(read)])
        np.testing.assert_array_equal(tokens, expected[len(expected) - len(tokens) :])


def test_the_losses_are_those_of_a_run_without_a_stop(logs: Logs) -> None:
    whole, on_one, on_two = (
        logs[name].scalars("lm loss") for name in ("whole", "on_one", "on_two")
    )
    for step in range(4, STEPS + 1):
        assert on_one[step] == whole[step]
    for step in range(7, STEPS + 1):
        assert on_two[step] == pytest.approx(whole[step], rel=2e-5)


def test_the_buffers_go_on_under_other_ranks(logs: Logs, folder: Path) -> None:
    assert logs
    one = read_rows(folder / "buffers.tokens", 1, 2)
    two = read_rows(folder / "buffers_on_two.tokens", 2, 2)
    assert sorted(two) == list(range(6, STEPS + 1))
    np.testing.assert_array_equal(
        np.concatenate([one[step] for step in range(1, STEPS + 1)]),
        without_a_stop(folder / "rsdb.yaml", 4 * 4 + 8 * 8),
    )
    for step, rows in two.items():
        np.testing.assert_array_equal(rows, one[step])


def test_each_domain_has_its_loss(logs: Logs) -> None:
    whole, on_two = logs["whole"], logs["on_two"]
    names = ("", " web", " news", " language english")
    domains = [whole.scalars(f"lm loss{name} validation") for name in names]
    assert list(domains[0]) == [6, 12]
    for step in (6, 12):
        total, web, news, english = (losses[step] for losses in domains)
        # As many samples of each, so the mean of both is the loss of all.
        assert total == pytest.approx((web + news) / 2, rel=1e-5) == pytest.approx(english)
        assert web != news
    for name in ("web", "news"):
        tag = f"lm loss {name} validation"
        assert on_two.scalars(tag)[12] == pytest.approx(whole.scalars(tag)[12], rel=2e-5)


STOPS, LONG_STEPS = 10, 60
LONG_ENDS = (6500, 15_000)  # of 23,040 tokens: 30 steps of 4 sequences and 30 of 8
LONG_SAMPLES = 30 * 4 + 30 * 8


@only_in_all
@pytest.mark.parametrize("order", ORDERS)
def test_ten_kills_change_nothing(order: str, data: Path, tmp_path: Path) -> None:
    """SIGKILL at random steps; then 1, 2 or 4 ranks go on with 0, 1 or 3 workers."""
    mixture = write(data, tmp_path, LONG_ENDS, ORDERS[order])
    tokens = killed_ten_times(data, tmp_path, f"{STEADY} --data {mixture}")
    expected = oracle(tmp_path, LONG_ENDS, LONG_SAMPLES)
    if order == "rsdb":
        expected = without_a_stop(mixture, LONG_SAMPLES)
    np.testing.assert_array_equal(tokens, expected)


def killed_ten_times(data: Path, folder: Path, flags: str) -> np.ndarray:
    """The tokens of a run that is killed in ten random steps and goes on each time.

    Args:
        data: Prepared data, whose tokenizer the run has.
        folder: For checkpoints and what the ranks have read.
        flags: Of the run, without those of its steps.

    Returns:
        ``[LONG_SAMPLES, SEQ_LENGTH]``; a step that was read again after a kill counts as it was
        read last.
    """
    flags += " --step-batch-size-schedule 0:4,7680:8 --micro-batch-size 1 --keep-last 3"
    flags += f" --train-iters {LONG_STEPS} --save-interval 2"
    generator = random.Random(5)
    stops = sorted(generator.sample(range(4, LONG_STEPS - 2), STOPS)) + [None]
    worlds = [generator.choice((1, 2, 4)) for _ in stops]
    read: dict[int, np.ndarray] = {}
    attempts: list[tuple[Path, int]] = []
    for number, (stop, ranks) in enumerate(zip(stops, worlds, strict=True)):
        prefix = folder / f"tokens_{number}"
        more = f" --num-workers {generator.choice((0, 1, 3))}"
        job = Job("run", flags + more, folder / "checkpoints", {"tokens": str(prefix)})
        train_until(data, folder, job, ranks, stop)
        attempts.append((prefix, ranks))
    begin = 2**31 - 1
    for prefix, ranks in reversed(attempts):
        steps = read_rows(prefix, ranks, 1, before=begin)
        begin = int(np.fromfile(f"{prefix}.0", np.int32, 1)[0])
        read |= steps
    assert sorted(read) == list(range(1, LONG_STEPS + 1))
    return np.concatenate([read[step] for step in sorted(read)])


def without_a_stop(mixture: Path, samples: int) -> np.ndarray:
    """The tokens of a mixture with buffers, read by one process, ``[samples, seq_length]``."""
    data = read_mixture(mixture)
    assert data is not None
    documents = [read_documents(item.train) for item in data.corpora.values()]
    names = list(data.corpora)
    phases = data.mixture.phases
    shared = BufferedMixture(
        names=names,
        lengths=[np.array([len(d) for d in corpus]) for corpus in documents],
        starts=phase_starts(phases, SEQ_LENGTH),
        parts=[
            dict(
                zip(
                    [names.index(name) for name in phase.weights],
                    whole_parts(list(phase.weights.values())),
                    strict=True,
                )
            )
            for phase in phases
        ],
        documents=data.mixture.buffer.documents,
        num_streams=data.mixture.buffer.streams or 0,
        seed=SEED,
        seq_length=SEQ_LENGTH,
        biases={2: LengthBias(0.3, 0.9, 200)},
    )
    streams = [VirtualStream(shared, number) for number in range(shared.num_streams)]
    found = []
    for sample in range(samples):
        pieces = streams[sample % len(streams)].next()
        parts = [documents[p.corpus][p.document][p.start : p.start + p.length] for p in pieces]
        found.append(np.concatenate(parts))
    return np.stack(found)


def train_until(data: Path, folder: Path, job: Job, ranks: int, stop: int | None) -> None:
    """Train, and kill all processes once a rank has begun a step; None trains to the end."""
    job = dataclasses.replace(job, probe={**job.probe, "kill_at": stop})
    plan = folder / "plan.json"
    plan.write_text(json.dumps([{"ranks": ranks, "jobs": [entry(data, folder, job)]}]))
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(plan)]
    with (folder / "log").open("w") as log:
        run = subprocess.run(
            command,
            env=environment(),
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            timeout=300,
        )
    lines = "\n".join((folder / "log").read_text().splitlines()[-40:])
    assert run.returncode == (0 if stop is None else -signal.SIGKILL), lines
