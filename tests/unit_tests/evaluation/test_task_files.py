"""A folder of tasks from elsewhere runs nothing: the tasks, and their templates."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import apply_template

from trinity_megatron.errors import UserError
from trinity_megatron.evaluation.task_files import plain_task_files

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
output_type: generate_until
"""
PLAIN = "metric_list: [{metric: exact_match}]\n"
PROGRAM = """
from pathlib import Path
Path(__file__).with_name("made").touch()
def work(docs): ...
"""
FUNCTION = "!function program.work"
HOSTILE = {
    "a function": (
        f"{TASK}{PLAIN}process_docs: {FUNCTION}\n",
        FUNCTION,
    ),
    "a function of Python": (f"{TASK}{PLAIN}process_docs: !function os.getcwd\n", "os.getcwd"),
    "a class": (f"{TASK}{PLAIN}class: {FUNCTION}\n", FUNCTION),
    "a metric": (f"{TASK}metric_list: [{{metric: !function program.work}}]\n", "program.work"),
    "a script": (
        f"{TASK}metric_list: [{{metric: program, hf_evaluate: true}}]\n",
        "metric program",
    ),
    "an unknown metric": (f"{TASK}metric_list: [{{metric: program}}]\n", "metric program"),
    "a function in an included file": (f"include: base\n{TASK}", FUNCTION),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)  # as the command does
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}))
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "program.py").write_text(PROGRAM)
    (tmp_path / "base").write_text(f"process_docs: {FUNCTION}\n" + PLAIN)
    yield tmp_path
    assert not list(tmp_path.rglob("made"))


def load(folder: Path, text: str) -> ConfigurableTask:
    (folder / "mine.yaml").write_text(text)
    with plain_task_files():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return manager.load(["mine"])["tasks"]["mine"]


def test_a_plain_task(folder: Path) -> None:
    task = load(folder, TASK + PLAIN)
    [doc] = task.test_docs()
    assert (task.doc_to_text(doc), task.doc_to_target(doc)) == ("a", "b")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_task(folder: Path, name: str) -> None:
    text, named = HOSTILE[name]
    with pytest.raises(UserError, match=named) as error:
        load(folder, text)
    assert "Remedy" in str(error.value)


def test_a_task_that_is_no_yaml_is_not_known(folder: Path) -> None:
    with pytest.raises(KeyError):
        load(folder, f"{TASK}{PLAIN}process_docs: !!python/name:os.getcwd\n")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ question.__class__.__base__.__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format(question) }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_hostile_template(template: str) -> None:
    from jinja2.exceptions import SecurityError

    with plain_task_files(), pytest.raises((SecurityError, OverflowError)):
        apply_template(template, {"question": "a"})


def test_functions_of_the_harness_are_its_own() -> None:
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    file = Path(tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    with plain_task_files():
        assert callable(load_yaml(file)["process_docs"])
