"""Scores of the harness: those of its own model class on the export, in every layout, in a run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.functional_tests.launch import (
    ADAM,
    TAKES_ALL,
    Job,
    environment,
    only_in_all,
    train,
)
from trinity_megatron.checkpoint.convert import megatron_to_hf

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'trinity_megatron[evaluate]'")

TASKS = "local_quiz,local_text,perplexity"
STEPS = 30
OVERLAPPED = (
    "--expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather"
)
SEQUENCE_PARALLEL = "--tensor-model-parallel-size 2 --sequence-parallel"
# Exponentials of a sum over thousands of tokens in fp32: the table has more digits than that holds.
COARSE = "word_perplexity"
_TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
_QUIZ = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
_TEXT = """
output_type: generate_until
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16}
metric_list: [{metric: exact_match}, {metric: chrf}]
"""


def write_tasks(folder: Path) -> None:
    """Half lines to finish among four, texts to continue, and two domains."""
    source = Path(json.__file__).with_name("decoder.py").read_text()
    lines = [line.strip() for line in source.splitlines() if len(line.strip()) > 24][:64]
    halves = [(line[:12], line[12:]) for line in lines]
    quiz = [
        {
            "question": start,
            "choices": [halves[(n + k) % len(halves)][1] for k in range(4)],
            "answer": 0,
        }
        for n, (start, _) in enumerate(halves[:24])
    ]
    texts = [
        {"question": source[n : n + 40 + n % 37], "answer": source[n + 80 : n + 90]}
        for n in range(100, 900, 100)
    ]
    for name, rows, rest in (("quiz", quiz, _QUIZ), ("text", texts, _TEXT)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name) + rest)
    (folder / "perplexity").mkdir()
    (folder / "perplexity" / "code.jsonl").write_text(json.dumps({"text": source[:2000]}) + "\n")
    (folder / "perplexity" / "notes.txt").write_text(str(json.__doc__)[:1500])


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Trainings with and without evaluations, on one rank and on two."""
    folder = tmp_path_factory.mktemp("evaluate")
    tasks = folder / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    every = f"--evaluate-every 10 --evaluate-tasks {TASKS} --evaluate-data {tasks}"
    base = f"--train-iters {STEPS} --save-interval {STEPS} {' '.join(ADAM)}"

    def job(name: str, flags: str, *, saves: bool = False) -> Job:
        return Job(name, f"{base} {flags}", folder / "saved" / "checkpoints" if saves else None)

    worlds = [
        (1, [job("plain", ""), job("scored", f"{every} --out {folder}/saved", saves=True)]),
        (
            2,
            [
                job("plain_ep2", OVERLAPPED),
                job("scored_ep2", f"{every} {OVERLAPPED} --out {folder}/ep2"),
                job("scored_tp2", f"{every} {SEQUENCE_PARALLEL} --out {folder}/tp2"),
            ],
        ),
    ][: 2 if TAKES_ALL else 1]
    logs = train(data, folder, worlds)
    return SimpleNamespace(folder=folder, tasks=tasks, data=data, logs=logs)


def run_command(*words: str | Path, cwd: Path | None = None) -> str:
    command = [sys.executable, "-m", *map(str, words)]
    env = {**environment(), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def evaluate(runs: SimpleNamespace, name: str, *flags: str) -> dict[str, Any]:
    """Results of the command on the saved run."""
    out = runs.folder / name
    text = run_command(
        *("trinity_megatron.cli", "evaluate", "--load", runs.folder / "saved" / "checkpoints"),
        *("--tasks", TASKS, "--data", runs.tasks.name, "--batch-size", "4", "--out", out),
        *flags,
        cwd=runs.folder,
    )
    found = json.loads((out / "evaluation" / f"{STEPS}.json").read_text())
    assert f"|{'local_quiz'}" in text and "Stderr" in text
    return found["results"]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All numbers are the same as the table has them; the coarse ones within fp32's precision."""
    assert found.keys() == expected.keys()
    for task, values in expected.items():
        for key, value in values.items():
            if not isinstance(value, float):
                assert found[task][key] == value
            elif key.startswith(COARSE):
                assert found[task][key] == pytest.approx(value, rel=1e-5)
            else:
                assert (key, f"{found[task][key]:.4f}") == (key, f"{value:.4f}")


@pytest.fixture(scope="module")
def ours(runs: SimpleNamespace) -> dict[str, Any]:
    return evaluate(runs, "alone")


def test_numbers_of_transformers_on_the_export(runs: SimpleNamespace, ours: dict[str, Any]) -> None:
    hf, out = runs.folder / "hf", runs.folder / "theirs"
    megatron_to_hf(runs.folder / "saved" / "checkpoints", hf, tokenizer=runs.data / "tokenizer")
    for domain, (kind, how) in {
        "code": ("json", ""),
        "notes": ("text", "sample_by: document"),
    }.items():
        file = next((runs.tasks / "perplexity").glob(f"{domain}.*"))
        (runs.tasks / f"{domain}.yaml").write_text(
            f"task: perplexity_{domain}\ndataset_path: {kind}\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {file}}}, {how}}}\n"
            "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
            "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, "
            "{metric: bits_per_byte}]\n"
        )
    names = "local_quiz,local_text,perplexity_code,perplexity_notes"
    run_command(
        *("lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={hf}"),
        *("--tasks", names, "--include_path", runs.tasks, "--device", "cpu"),
        *("--batch_size", "4", "--output_path", out),
        cwd=runs.tasks,
    )
    (path,) = out.rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    assert_same(ours, theirs)
    assert set(ours) == set(names.split(","))
    assert 0 < ours["local_quiz"]["acc,none"] < 1
    assert ours["local_text"]["chrf,none"] > 0


@only_in_all
@pytest.mark.parametrize("layout", ["tensor", "expert"])
def test_numbers_over_two_ranks(layout: str, runs: SimpleNamespace, ours: dict[str, Any]) -> None:
    found = evaluate(runs, layout, "--nproc", "2", f"--{layout}-model-parallel-size", "2")
    assert_same(found, ours)


def test_numbers_in_the_training_are_those_of_its_checkpoint(
    runs: SimpleNamespace, ours: dict[str, Any]
) -> None:
    folder = runs.folder / "saved" / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == ["10.json", "20.json", "30.json"]
    found = json.loads((folder / f"{STEPS}.json").read_text())["results"]
    assert_same(found, ours)
    logged = runs.logs["scored"].scalars("eval/local_quiz/acc")
    assert list(logged) == [10, 20, 30]
    assert logged[STEPS] == pytest.approx(ours["local_quiz"]["acc,none"], abs=1e-7)
    page = (runs.folder / "saved" / "report" / "report.html").read_text()
    assert f"{ours['perplexity_code']['bits_per_byte,none']:.4f}" in page


@only_in_all
@pytest.mark.parametrize("name", ["ep2", "tp2"])
def test_numbers_in_a_training_over_two_ranks(name: str, runs: SimpleNamespace) -> None:
    found, expected = (
        json.loads((runs.folder / run / "evaluation" / "10.json").read_text())["results"]
        for run in (name, "saved")
    )
    for task in ("perplexity_code", "perplexity_notes"):
        # The weights are those of one rank within the rounding of ten steps.
        key = "bits_per_byte,none"
        assert found[task][key] == pytest.approx(expected[task][key], rel=1e-4)
    assert found.keys() == expected.keys()


@pytest.mark.parametrize(
    ("scored", "plain"),
    [("scored", "plain"), pytest.param("scored_ep2", "plain_ep2", marks=only_in_all)],
)
def test_an_evaluation_changes_nothing_of_the_training(
    scored: str, plain: str, runs: SimpleNamespace
) -> None:
    for tag in ("lm loss", "grad-norm"):
        expected = runs.logs[plain].scalars(tag)
        assert len(expected) == STEPS
        assert runs.logs[scored].scalars(tag) == expected
    tokens = [runs.logs[name].tensors("moe/tokens_per_expert") for name in (scored, plain)]
    assert tokens[0].keys() == tokens[1].keys() and len(tokens[0]) > 0
    assert all((tokens[0][step] == tokens[1][step]).all() for step in tokens[0])
