"""A mixture at the start of a run: what is refused, said, and set."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.indexed_data import write_dataset
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import UserError

enter_host()

from trinity_megatron.training.arguments.mixture_checks import check_mixture  # noqa: E402

TEXT = """
corpora:
  web:  {path: web, language: english, validation: valid}
  code: {path: code, validation: valid}
phases: [{until: 2K, weights: {web: 0.7, code: 0.3}}, {until: 20K, weights: {web: 1}}]
tokenizer: tokenizer
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, documents in (("web", 100), ("code", 4), ("valid", 2)):
        write_dataset(tmp_path / name, [100] * documents)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    return tmp_path


def make_args(folder: Path, text: str = TEXT, **given: Any) -> Namespace:
    (folder / "mix.yaml").write_text(text)
    names = ("data_path", "data_args_path", "per_split_data_args_path", "test_data_path")
    more = ("phase_transition_iterations", "train_samples", "eval_global_batch_size")
    more += ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    values: dict[str, Any] = dict.fromkeys((*names, *more, "non_persistent_ckpt_type"))
    values |= {
        "data": str(folder / "mix.yaml"),
        "train_data_path": [str(folder / "web"), str(folder / "code")],
        "valid_data_path": [str(folder / "valid")] * text.count("validation: valid") or None,
        "mock_data": False,
        "skip_train": False,
        "full_validation": False,
        "eval_iters": 1,
        "seq_length": 64,
        "seed": 1,
        "train_iters": 10,
        "global_batch_size": 8,
        "step_batch_size_schedule": None,
        "save": str(folder / "checkpoints"),
        "dataloader_type": "single",
    }
    return Namespace(**{**values, **given})


def test_a_mixture_is_described_in_plain_words(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = make_args(folder)
    check_mixture(args)
    described = args.data_mixture
    assert json.loads(json.dumps(described)) == described  # no class of ours in a checkpoint
    assert [phase["start"] for phase in described["phases"]] == [0, 32]
    assert described["phases"][0]["names"] == ["code", "web"]
    assert described["phases"][0]["parts"] == [3, 7]
    assert args.dataloader_type == "single" and not hasattr(args, "dataloader_save")
    # 80 sequences of 64 tokens; code has 400 tokens and a third of the first 32 sequences.
    said = capsys.readouterr().out
    assert "> code is read 1." in said and "web" not in said


def test_the_buffers_have_their_streams(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = make_args(folder, f"{TEXT}order: rsdb", step_batch_size_schedule="0:8,1K:12")
    check_mixture(args)
    assert args.data_mixture["buffer"] == {"documents": 2048, "streams": 4}
    assert (args.dataloader_type, args.dataloader_save) == ("external", args.save)
    args = make_args(folder, f"{TEXT}order: rsdb\nrsdb: {{streams: 24, documents: 2}}")
    check_mixture(args)
    assert args.data_mixture["buffer"] == {"documents": 2, "streams": 24}
    said = capsys.readouterr().out
    assert "hold 16,384 documents and the corpora have 104" in said and "hold 96" not in said


def test_a_folder_is_no_mixture(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")
    for data in (None, str(folder)):
        args = make_args(folder, data=data)
        check_mixture(args)
        assert args.data_mixture is None


BARE = TEXT.replace(", validation: valid", "")


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        (TEXT, {"train_data_path": ["x"]}, ("--train-data-path beside --data",)),
        (TEXT, {"mock_data": True}, ("--mock-data beside --data",)),
        (TEXT, {"phase_transition_iterations": [5]}, ("--phase-transition-iterations",)),
        (BARE, {}, ("--eval-iters 1, and no corpus", "validation: PREFIX")),
        (TEXT, {"global_batch_size": 1}, ("reads 1 sequences", "2 corpora", "--eval-iters 2")),
        (TEXT, {"train_iters": 100}, ("the last phase ends at 20.00K", "51,200")),
        (f"{TEXT}order: rsdb", {"non_persistent_ckpt_type": "global"}, ("order: rsdb",)),
    ],
)
def test_what_a_run_cannot_follow(
    folder: Path, text: str, given: dict[str, Any], expected: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        check_mixture(make_args(folder, text, **given))
    for words in (*expected, "Remedy: "):
        assert words in str(error.value), str(error.value)


def test_without_validation(folder: Path) -> None:
    check_mixture(make_args(folder, BARE, eval_iters=0))
