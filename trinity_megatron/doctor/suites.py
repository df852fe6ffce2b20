"""Parts that are pytest suites of the checkout."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trinity_megatron.doctor.environment import ROOT
from trinity_megatron.doctor.result import Deadline, PartResult, Settings, Table
from trinity_megatron.doctor.runs import environment

NUMERICS, TESTS = "numerics", "tests"
FUNCTIONAL = ("test_resume.py", "test_skipped_step.py", "test_parallel_parity.py")


@dataclass
class _Outcome:
    """One pytest process: (test, outcome, measured figures) of each test that was run."""

    tests: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: str = ""
    was_stopped: bool = False


def check_numerics(settings: Settings, deadline: Deadline) -> PartResult:
    """``tests/gpu``: what this device computes against float64, and FP8 against bf16."""
    result = PartResult(NUMERICS)
    folder = ROOT / "tests" / "gpu"
    if not folder.is_dir():
        result.status, result.reason = "skipped", f"{folder} is missing: not a checkout"
        return result
    done = _pytest([str(folder)], settings, deadline, name=NUMERICS)
    result.skipped += done.skipped
    if done.was_stopped:
        result.fail(f"stopped at the part's limit of {deadline.seconds:.0f} s")
    if done.failed:
        result.fail(done.failed)
    columns = ("test", "outcome", "measured (bound)")
    result.tables.append(Table("Numerics: tests/gpu", columns, done.tests))
    return result


def check_tests(settings: Settings, deadline: Deadline) -> PartResult:
    """On a GPU machine: functional tests of the CPU path, unchanged, a GPU for each rank."""
    result = PartResult(TESTS)
    folder = ROOT / "tests" / "functional_tests"
    if not settings.on_gpu or not folder.is_dir():
        result.status = "skipped"
        result.reason = f"{folder} is missing: not a checkout"
        if not settings.on_gpu:
            result.reason = (
                "needs a CUDA device: it shows that the tests of the CPU path hold there too; "
                "`make test` runs them on a CPU"
            )
        return result
    rows = []
    for file in FUNCTIONAL:
        if deadline.remaining() < 10:
            result.skipped.append(f"{file}: the part's {deadline.seconds:.0f} s were over")
            continue
        done = _pytest([str(folder / file)], settings, deadline, name=Path(file).stem)
        result.skipped += done.skipped
        if done.was_stopped:
            result.skipped.append(f"{file}: not finished in the part's {deadline.seconds:.0f} s")
        elif done.failed:
            result.fail(done.failed)
        if done.tests:
            passed = sum(outcome == "passed" for _, outcome, _ in done.tests)
            rows.append((file, str(passed), str(len(done.tests) - passed)))
    title = "Functional tests on CUDA; a world with more ranks than GPUs is left out"
    result.tables.append(Table(title, ("file", "passed", "others"), rows))
    return result


def _pytest(
    arguments: Sequence[str], settings: Settings, deadline: Deadline, *, name: str
) -> _Outcome:
    """Run pytest in a process, at most until the deadline."""
    settings.out.mkdir(parents=True, exist_ok=True)
    report, log = settings.out / f"{name}.xml", settings.out / f"{name}.txt"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    variables = environment(settings)
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        variables.pop(variable)  # the tests set up worlds of their own
    try:
        with log.open("w") as output:
            done = subprocess.run(
                [*command, f"--junit-xml={report}", "-o", "junit_family=xunit1"],
                cwd=ROOT,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(deadline.remaining(), 1.0),
            )
    except subprocess.TimeoutExpired:
        return _Outcome(was_stopped=True)
    if not report.is_file():
        return _Outcome(failed=f"{name}: pytest ended with {done.returncode}; see {log}")
    outcome = read_junit(report)
    if done.returncode:
        failed = [test for test, word, _ in outcome.tests if word == "failed"]
        outcome.failed = f"{name}: {', '.join(failed) or 'pytest failed'}; see {log}"
    return outcome


def read_junit(report: Path) -> _Outcome:
    """Tests of pytest's JUnit file; what a test recorded as a property is its figures."""
    outcome = _Outcome()
    for case in ElementTree.parse(report).iter("testcase"):
        test = str(case.get("name"))
        skip = case.find("skipped")
        if skip is not None:
            outcome.skipped.append(f"{test}: {skip.get('message')}")
            continue
        word = "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            word = "failed"
        figures = [f"{p.get('name')} {p.get('value')}" for p in case.iter("property")]
        outcome.tests.append((test, word, "; ".join(figures)))
    return outcome
