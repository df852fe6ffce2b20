"""The plan of a mixture, its corpora on the disk, and the command that shows it."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.unit_tests.indexed_data import write_dataset
from trinity_megatron.cli import main as cli
from trinity_megatron.data.manifest import load_manifest
from trinity_megatron.data.mixture.corpora import MixtureData
from trinity_megatron.data.mixture.mixture_file import load_mixture
from trinity_megatron.data.mixture.open_corpora import open_mixture, read_outline
from trinity_megatron.data.mixture.plan import describe_epochs, make_plan, make_schedule
from trinity_megatron.errors import UserError

SEQ_LENGTH = 64
TEXT = """
corpora:
  web:  {path: web, language: english}
  news: {path: news, language: english}
  code: {path: code, language: python, validation: code_valid%s}
phases:
  - {until: 6400, weights: {web: 0.7, code: 0.3}}
  - {until: 9600, weights: {web: 1, news: 1}}
  - {until: 16K, weights: {code: 0.5, news: 0.5}}
tokenizer: tokenizer
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, documents in (("web", 40), ("news", 10), ("code", 10), ("code_valid", 1)):
        write_dataset(tmp_path / name, [100] * documents)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    write(tmp_path)
    return tmp_path


def write(folder: Path, more: str = "") -> Path:
    path = folder / "mix.yaml"
    path.write_text(TEXT % more)
    return path


def opened(folder: Path) -> MixtureData:
    return open_mixture(load_mixture(folder / "mix.yaml"))


def test_an_epoch_of_longer_documents_has_fewer_tokens(folder: Path) -> None:
    """Every document has 100 tokens: half of them are read, and an epoch is twice as short."""
    bias = ", length_bias: {floor: 0.2, ceiling: 0.8, tokens: 200}"
    path = write(folder, bias)
    path.write_text(path.read_text() + "order: rsdb\nrsdb: {documents: 4}\n")
    plan = make_plan(opened(folder), seq_length=SEQ_LENGTH, seed=3, samples=250)
    code = plan.corpora[2]
    assert (code.held, code.epoch_tokens) == (1000, 500)
    assert code.epochs == code.tokens / 500
    (line,) = [line for line in describe_epochs(plan) if line.startswith("code")]
    assert f"code is read {code.epochs:.2f} times" in line


def test_raw_text_has_no_length_bias(folder: Path) -> None:
    (folder / "raw.txt").write_text("text")
    path = folder / "raw.yaml"
    path.write_text("corpora: {a: {path: raw.txt, length_bias: {}}}\norder: rsdb\n")
    with pytest.raises(UserError, match=r"corpora\.a\.length_bias .* Remedy: drop it, or prep"):
        open_mixture(load_mixture(path))


def test_the_plan_is_what_the_schedule_does(folder: Path) -> None:
    data = opened(folder)
    plan = make_plan(data, seq_length=SEQ_LENGTH, seed=3, samples=250)
    schedule = make_schedule(data.mixture, SEQ_LENGTH, 3)
    corpora, _ = schedule.locate(np.arange(250))
    for number, item in enumerate(plan.corpora):
        bounds = ((0, 100), (100, 150), (150, 250))
        read = tuple(int((corpora[a:b] == number).sum()) * SEQ_LENGTH for a, b in bounds)
        assert item.by_phase == read
    assert [item.held for item in plan.corpora] == [4000, 1000, 1000]
    assert sum(item.tokens for item in plan.corpora) == plan.tokens == 16_000
    languages = plan.by_language()
    assert languages["python"] == plan.corpora[2].by_phase
    assert sum(languages["english"]) == plan.corpora[0].tokens + plan.corpora[1].tokens


def test_the_beginning_of_each_epoch_is_said(folder: Path) -> None:
    data = opened(folder)
    plan = make_plan(data, seq_length=SEQ_LENGTH, seed=3, samples=250)
    corpora, _ = make_schedule(data.mixture, SEQ_LENGTH, 3).locate(np.arange(250))
    seen: Counter[int] = Counter()
    begin: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for sample, corpus in enumerate(corpora.tolist()):
        # A sample is of the epoch of its last token, which is the label of the one before it.
        held = plan.corpora[corpus].held
        epoch = -(-((seen[corpus] + 1) * 64 + 1) // held) - 1
        if epoch > len(begin[corpus]):
            begin[corpus].append(sample * 64)
        seen[corpus] += 1
    for corpus, item in enumerate(plan.corpora):
        assert list(item.epochs_begin) == begin[corpus][:10], item.name
    lines = describe_epochs(plan)
    assert [line.split()[0] for line in lines] == ["web", "news", "code"]


@pytest.mark.parametrize(
    ("more", "tokens", "expected"),
    [
        (", max_epochs: 2", 250, ("code has 1.00K tokens", "read 5.", "max_epochs 2")),
        ("", 251, ("the last phase ends at 16.00K", "16,064")),
    ],
)
def test_a_plan_that_cannot_be_met(
    folder: Path, more: str, tokens: int, expected: tuple[str, ...]
) -> None:
    write(folder, more)
    with pytest.raises(UserError) as error:
        make_plan(opened(folder), seq_length=SEQ_LENGTH, seed=3, samples=tokens)
    for words in expected:
        assert words in str(error.value)


def test_a_phase_without_a_sequence(folder: Path) -> None:
    with pytest.raises(UserError, match=r"phases\[1\] is empty: no sequence of 12800"):
        make_plan(opened(folder), seq_length=12800, seed=3, samples=1)


def test_a_corpus_shorter_than_a_sequence(folder: Path) -> None:
    with pytest.raises(UserError, match="news has 1,000 tokens, which is not one sequence of 1280"):
        make_plan(opened(folder), seq_length=1280, seed=3, samples=12)


def damage(folder: Path, name: str) -> None:
    path = folder / name
    if name.endswith(".idx"):
        path.write_bytes(path.read_bytes()[:40])
    elif name == "code.bin":
        path.unlink()
    elif name == "web.bin":
        path.write_bytes(b"")
    elif name == "text":
        (folder / "web.idx").unlink()
        (folder / "web").mkdir()
    else:
        (folder / "tokenizer/tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web.idx", ("corpora.web.path", "no whole index")),
        ("code.bin", ("corpora.code.path", "code.bin", "cannot be read")),
        ("code_valid.idx", ("corpora.code.validation", "no whole index")),
        ("web.bin", ("corpora.web.path", "has no tokens")),
        ("text", ("order is shuffled, which raw text", "order: sequential")),
        ("tokenizer", ("tokenizer", "no tokenizer.json")),
    ],
)
def test_a_corpus_that_cannot_be_read(folder: Path, name: str, expected: tuple[str, ...]) -> None:
    damage(folder, name)
    with pytest.raises((UserError, FileNotFoundError)) as error:
        opened(folder)
    for words in ("mix.yaml", *expected):
        assert words in str(error.value)


def test_a_corpus_of_another_tokenizer(folder: Path, data: Path) -> None:
    path = folder / "two.yaml"
    path.write_text(
        f"corpora: {{a: {{path: {data}}}, b: {{path: web}}}}\ntokenizer: tokenizer\n"
        "phases: [{weights: {a: 1, b: 1}}]"
    )
    with pytest.raises(UserError, match=r"corpora\.a was made with another tokenizer"):
        open_mixture(load_mixture(path))


def test_a_prepared_folder_brings_tokenizer_and_validation(folder: Path, data: Path) -> None:
    path = folder / "one.yaml"
    path.write_text(f"corpora: {{a: {{path: {data}}}}}")
    mixture = open_mixture(load_mixture(path))
    assert mixture.tokenizer == data / "tokenizer"
    assert mixture.manifest and mixture.manifest.train.tokens == mixture.corpora["a"].tokens
    assert mixture.validated["a"].validation == data / "validation"
    path.write_text(f"corpora: {{a: {{path: {data}, validation: {data}}}}}")
    with pytest.raises(UserError, match="is a folder of prepare-data. Remedy: .*/validation, the"):
        open_mixture(load_mixture(path))


def test_one_path_twice(folder: Path) -> None:
    path = folder / "twice.yaml"
    path.write_text(
        "corpora: {a: {path: web}, b: {path: ./web}}\ntokenizer: tokenizer\n"
        "phases: [{weights: {a: 1, b: 1}}]"
    )
    with pytest.raises(UserError, match=r"corpora\.b\.path is that of a\. Remedy: one corpus"):
        open_mixture(load_mixture(path))


def test_the_first_wrong_corpus_is_named(folder: Path) -> None:
    """Corpora are looked at side by side; what is said does not depend on which is faster."""
    names = [f"none{number}" for number in range(40)]
    corpora = ", ".join(f"{name}: {{path: {name}}}" for name in names)
    weights = ", ".join(f"{name}: 1" for name in names)
    path = folder / "wrong.yaml"
    path.write_text(f"corpora: {{{corpora}}}\nphases: [{{weights: {{{weights}}}}}]")
    with pytest.raises(FileNotFoundError, match=r"corpora\.none0\.path: .*none0\.idx"):
        open_mixture(load_mixture(path))


def test_what_a_rank_knows_before_it_is_told(folder: Path, data: Path) -> None:
    path = folder / "outline.yaml"
    text = f"corpora: {{a: {{path: nowhere}}, b: {{path: {data}}}}}\n"
    text += "phases: [{weights: {a: 1, b: 1}}]"
    path.write_text(text)
    outline = read_outline(path)
    assert outline is not None and not isinstance(outline, MixtureData)
    assert outline.tokenizer == data / "tokenizer" and outline.manifest == load_manifest(data)
    path.write_text(f"{text}\ntokenizer: tokenizer")
    outline = read_outline(path)
    assert outline is not None and outline.tokenizer == folder / "tokenizer"
    path.write_text(f"{text}\ntokenizer: nowhere")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        read_outline(path)
    assert read_outline(data) is None


def test_nothing_says_the_tokenizer(folder: Path) -> None:
    path = folder / "bare.yaml"
    path.write_text("corpora: {a: {path: web}}")
    with pytest.raises(UserError, match="tokenizer: FOLDER"):
        open_mixture(load_mixture(path))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(folder / "mix.yaml")
    assert cli.main(["data", "show", file, "--seq-length", "64"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:2] == ["corpus", "language"]
    assert shown[0].split()[-3:] == ["share", "has", "epochs"]
    assert [line.split()[0] for line in shown[1:4]] == ["web", "news", "code"]
    assert any(line.startswith("python") for line in shown)
    assert any("news is read" in line for line in shown)
    assert cli.main(["data", "show", file, "--until", "20K"]) == 2
    assert "ends at 16.00K" in capsys.readouterr().err
    assert cli.main(["data", "show", str(folder / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
