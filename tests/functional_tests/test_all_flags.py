"""Every flag of Megatron's parser: followed, said to have no effect, or refused with a remedy.

python -m tests.functional_tests.test_all_flags --all      # 25 minutes; writes docs/flags.md
python -m tests.functional_tests.test_all_flags --lr --seed
"""

import argparse
import contextlib
import importlib.util
import random
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from tests.functional_tests import flag_table
from tests.functional_tests.flag_table import Trial, load_trials

pytestmark = pytest.mark.slow  # imports megatron.training, trains

# What is tried in each run of the tests: of each kind, drawn once.
NUM_SAMPLED = 12


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """The parser of the training entry."""
    return make_parser()


def make_parser() -> argparse.ArgumentParser:
    """Megatron's parser with our flags and defaults, with nothing given."""
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from megatron.training.arguments import add_megatron_arguments

    from trinity_megatron.training.arguments.parser import add_trinity_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        return add_trinity_args(parser)


def test_every_flag_is_tried(parser: argparse.ArgumentParser) -> None:
    flags = flag_table.flags_of(parser)
    tried = [trial.flag for trial in load_trials()]
    assert sorted(tried) == sorted(flags)
    known = set(parser._option_string_actions)
    assert set(flag_table.reasons()) <= known and set(flag_table.refused_elsewhere()) <= set(flags)


@pytest.mark.parametrize("trial", load_trials(), ids=lambda trial: trial.flag)
def test_what_the_table_says_of_a_flag(
    trial: Trial, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    from trinity_megatron.training.arguments.unsupported import refuse_flags

    action = parser._option_string_actions[trial.flag]
    given = parser.parse_args([trial.flag, *trial.rest.split()])
    given.rank = 0
    if trial.flag in flag_table.ALREADY_SO:
        assert getattr(given, action.dest) == parser.get_default(action.dest)
        return
    assert getattr(given, action.dest) != parser.get_default(action.dest)
    reason = flag_table.reasons().get(trial.flag)
    is_refused = reason is not None and reason.refused and reason.holds(given)
    context = pytest.raises(ValueError) if is_refused else contextlib.nullcontext()
    with context as error:
        refuse_flags(given, parser)
    said = str(error.value) if error else capsys.readouterr().out
    if reason is not None and reason.holds(given):
        assert trial.flag in said and str(reason.refused or reason.ignored) in said
    else:
        assert trial.flag not in said


def test_the_document_has_the_table(parser: argparse.ArgumentParser) -> None:
    assert flag_table.DOCUMENT.read_text() == flag_table.render(parser)


def test_a_sample(data: Path, tmp_path: Path) -> None:
    has_harness = importlib.util.find_spec("lm_eval") is not None
    trials = [
        t
        for t in load_trials()
        if t.ranks == 1 and (has_harness or not t.flag.startswith("--evaluate"))
    ]
    sample = random.Random(0).sample(trials, NUM_SAMPLED)
    assert not failures(sample, data, tmp_path, timeout=300)


def failures(trials: list[Trial], data: Path, folder: Path, *, timeout: float) -> list[str]:
    """Try the flags; what came to something else than the tables say."""
    wrong = []
    for trial, outcome in flag_table.run_trials(trials, data, folder, timeout=timeout):
        if not flag_table.is_expected(trial.flag, outcome):
            wrong.append(f"{trial.flag} {trial.rest}: {outcome.kind}: {outcome.message}")
    return wrong


def main() -> None:
    """Try all flags or those that are named; write the document after all."""
    from trinity_megatron.data.prepare import prepare_data

    named = sys.argv[1:]
    trials = [t for t in load_trials() if named == ["--all"] or t.flag in named]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))[:36]
        prepare_data(folder / "data", sources, vocab_size=512)
        wrong = failures(trials, folder / "data", folder, timeout=4 * 3600)
    print(*wrong, f"{len(trials)} flags tried, {len(wrong)} not as the tables say", sep="\n")
    if named == ["--all"] and not wrong:
        flag_table.DOCUMENT.write_text(flag_table.render(make_parser()))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
