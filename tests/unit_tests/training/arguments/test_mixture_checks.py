"""A mixture at the start of a run: what is refused, said, and set."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.indexed_data import write_dataset
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.data.mixture.open_corpora import read_mixture, read_outline
from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from trinity_megatron.errors import UserError

enter_host()

from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

from trinity_megatron.data.text.text_mixture import TextEncoder  # noqa: E402
from trinity_megatron.training.arguments import mixture_checks  # noqa: E402
from trinity_megatron.training.datasets import validation_text  # noqa: E402
from trinity_megatron.training.datasets.data_identity import (  # noqa: E402
    add_text,
    check_data,
    describe_dataset,
)
from trinity_megatron.training.datasets.validation_text import (  # noqa: E402
    validation_prefixes,
)

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
        "train_data_path": None,
        "valid_data_path": None,
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


def check_mixture(args: Namespace) -> None:
    """As the first rank does."""
    mixture_checks.check_mixture(args, read_mixture(args.data))


def test_a_mixture_is_described_in_plain_words(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = make_args(folder)
    check_mixture(args)
    assert args.train_data_path == [str(folder / "web"), str(folder / "code")]
    assert args.valid_data_path == [str(folder / "valid")] * 2
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
        (BARE, {}, ("--eval-iters 1, and no corpus", "validation: PATH")),
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


RAW = """
corpora:
  web:  {path: raw_web}
  code: {path: raw_code.jsonl, language: python}
phases: [{until: 2K, weights: {web: 0.7, code: 0.3}}, {weights: {web: 1}}]
order: rsdb
"""


@pytest.fixture
def raw(folder: Path) -> Path:
    (folder / "raw_web").mkdir()
    for path in (folder / "raw_web/a.jsonl", folder / "raw_code.jsonl"):
        path.write_text('{"text": "x"}\n')
    save_tokenizer(train_tokenizer(["x yy x yy"], vocab_size=260), folder / "raw_tokenizer")
    return folder


def make_raw_args(folder: Path, text: str = RAW, **given: Any) -> Namespace:
    values = {"eval_iters": 0, "rank": 0, "data_identity": None}
    values |= {"tokenizer_model": str(folder / "raw_tokenizer")}
    return make_args(folder, text, **{**values, **given})


@pytest.mark.parametrize("order", ["rsdb", "sequential"])
def test_raw_text_has_a_loader_of_its_own(
    raw: Path, capsys: pytest.CaptureFixture[str], order: str
) -> None:
    args = make_raw_args(raw, RAW.replace("rsdb", order))
    check_mixture(args)
    assert (args.dataloader_type, args.dataloader_save) == ("external", args.save)
    assert args.data_mixture["is_text"] and args.data_mixture["order"] == order
    assert [corpus.name for corpus in args.text_corpora] == ["web", "code"]
    assert "> web: 1 files of text, 14 bytes" in capsys.readouterr().out
    identity = add_text(None, args.text_corpora)
    assert identity is not None
    assert [item["prefix"] for item in identity["train"]] == ["web", "code"]
    assert json.loads(json.dumps([args.data_mixture, identity])) == [args.data_mixture, identity]
    others = make_raw_args(raw, rank=1)
    mixture_checks.check_mixture(others, read_outline(others.data))
    assert others.text_corpora is None  # rank 0 alone looks at the files


def test_raw_text_and_prepared_data_in_one_mixture(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RAW.replace("raw_code.jsonl", "code, max_epochs: 2")
    args = make_raw_args(raw, text)
    check_mixture(args)  # Megatron's datasets read none of them
    web, code = args.text_corpora
    assert (code.prefix, code.documents) == (raw / "code", 4)
    identity = add_text(None, args.text_corpora)
    assert identity is not None
    expected = describe_dataset(str(raw / "code"))["content"]
    assert [item["content"] for item in identity["train"]] == [web.content, expected]
    said = capsys.readouterr().out
    assert "> code: prepared, 1,600 bytes" in said
    few = text.replace("max_epochs: 2", "max_epochs: 0.1")
    with pytest.raises(UserError, match="code has 400 tokens and would be read"):
        check_mixture(make_raw_args(raw, few))


def test_the_tokenizer_is_that_of_the_prepared_corpora(raw: Path, data: Path) -> None:
    text = RAW.replace("raw_code.jsonl", str(data))
    args = make_raw_args(raw, text, tokenizer_model=str(data / "tokenizer"))
    check_mixture(args)
    assert args.valid_data_path == [str(data / "validation")]
    args = make_raw_args(raw, text)
    with pytest.raises(UserError, match="raw_tokenizer is not the tokenizer .* of the prepared"):
        check_mixture(args)


VALIDATED = RAW.replace("path: raw_web", "path: raw_web, validation: held_out.jsonl")


def test_validation_data_can_be_raw_text(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out, cache = raw / "held_out.jsonl", raw / "cache"
    held_out.write_text('{"text": "yy x"}\n{"text": ""}\n{"text": "x"}\n')

    def start(**given: Any) -> Namespace:
        given = {"eval_iters": 1, "data_cache_path": str(cache), **given}
        args = make_raw_args(raw, VALIDATED, **given)
        check_mixture(args)
        return args

    assert start(is_dry=True).valid_data_path is None and not cache.exists()
    assert start(eval_iters=0).valid_data_path is None and not cache.exists()
    prefix = cache / "validation_web"
    assert start().valid_data_path == [str(prefix)]
    encoder = TextEncoder(raw / "raw_tokenizer")
    found = IndexedDataset(str(prefix))
    expected = [encoder.encode(text).tolist() for text in ("yy x", "x")]
    assert [found[index].tolist() for index in range(len(found))] == expected
    count = sum(map(len, expected))
    assert f"> web: {count} validation tokens of" in capsys.readouterr().out
    # Once; and again where the text is another.
    assert start().valid_data_path == [str(prefix)]
    assert "validation tokens" not in capsys.readouterr().out
    held_out.write_text('{"text": "x"}\n')
    start()
    found = IndexedDataset(str(prefix))
    assert found[0].tolist() == expected[1]
    assert {path.suffix for path in cache.iterdir()} == {".bin", ".idx", ".json"}
    data = read_mixture(raw / "mix.yaml")
    assert data is not None and list(validation_prefixes(start(), data)) == ["web"]


@pytest.mark.parametrize(
    ("content", "given", "expected"),
    [
        ('{"text": ""}\n', {}, "web.validation .*held_out.jsonl holds no text"),
        ("", {}, "holds no text"),
        ('{"body": "x"}\n', {}, "web.validation: .*line 1"),
        ('{"text": "x"}\n' * 9, {}, "has 126 bytes, .* 100 are its limit. .*prepare-data"),
        ('{"text": "x"}\n', {"data_cache_path": None}, "web.validation is raw text, .*--out"),
        ('{"text": "x"}\n', {"tokenizer_model": None}, "--tokenizer-model is no folder"),
    ],
)
def test_validation_text_that_is_refused(
    content: str,
    given: dict[str, Any],
    expected: str,
    raw: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation_text, "MOST_BYTES", 100)
    (raw / "held_out.jsonl").write_text(content)
    given = {"eval_iters": 1, "data_cache_path": str(raw / "cache"), **given}
    with pytest.raises(UserError, match=expected) as error:
        check_mixture(make_raw_args(raw, VALIDATED, **given))
    assert "Remedy: " in str(error.value)
    assert not list(raw.glob("cache/*"))


def test_a_resume_with_other_text_is_refused(raw: Path) -> None:
    saved = make_raw_args(raw)
    check_mixture(saved)
    saved.data_identity = add_text(None, saved.text_corpora)
    saved.consumed_train_samples = 40
    for name, content, phase in (("raw_web/a.jsonl", "y", "phase 1"), ("raw_web/a.jsonl", "x", "")):
        (raw / name).write_text(f'{{"text": "{content}"}}\n')
        args = make_raw_args(raw, allow_data_change=False, load="x")
        check_mixture(args)
        args.data_identity = add_text(None, args.text_corpora)
        if not phase:
            check_data(saved, 1, args)
            continue
        with pytest.raises(UserError, match=f"{phase}: the content of its corpora"):
            check_data(saved, 1, args)


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        (RAW.replace("rsdb", "shuffled"), {}, ("order is shuffled", "order: sequential")),
        (RAW.replace("order: rsdb", ""), {}, ("order is shuffled",)),
        (RAW.replace("python", "python, max_epochs: 2"), {}, ("corpora.code.max_epochs is 2",)),
        (RAW, {"tokenizer_model": None}, ("--tokenizer-model is no folder",)),
        (RAW, {"tokenizer_model": "none"}, ("--tokenizer-model none is no folder",)),
        (RAW, {"eval_iters": 1}, ("no corpus", "validation data")),
        (RAW, {"non_persistent_ckpt_type": "global"}, ("global with raw text",)),
        (RAW.replace("raw_web", "raw_web, text_key: body"), {}, ("a.jsonl", "body")),
        (RAW.replace("raw_web", "nothing"), {}, ("corpora.web.path", "nothing.idx")),
        (TEXT.replace("path: web", "path: web, text_key: x"), {}, ("web is no raw text",)),
        (RAW.replace("raw_web", "."), {}, ("holds an index of token ids", "a .bin and .idx")),
    ],
)
def test_raw_text_that_is_refused(
    raw: Path, text: str, given: dict[str, Any], expected: tuple[str, ...]
) -> None:
    with pytest.raises((UserError, FileNotFoundError)) as error:
        check_mixture(make_raw_args(raw, text, **given))
    for words in (*expected, "Remedy: "):
        assert words in str(error.value), str(error.value)


def test_data_can_be_the_text_itself(raw: Path) -> None:
    args = make_raw_args(raw, data=str(raw / "raw_web"))
    check_mixture(args)
    assert args.data_mixture["order"] == "rsdb" and args.data_mixture["corpora"] == ["text"]
    for name in ("empty", "half"):
        (raw / name).mkdir()
    (raw / "half/train.bin").write_text("x")
    for name in ("empty", "half", "none"):  # what prepare-data has not finished, or no one has
        assert read_mixture(raw / name) is None
