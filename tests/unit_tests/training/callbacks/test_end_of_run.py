"""The end of a run: each part fails alone, and in a line."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit_tests.training.datasets.test_splits import arguments, make_set
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.training import global_vars  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

from trinity_megatron.training.callbacks import end_of_run  # noqa: E402
from trinity_megatron.training.callbacks.end_of_run import (  # noqa: E402
    ValidationTokens,
    attempt,
    choose_prompt,
    finish_run,
)
from trinity_megatron.training.datasets.provider import samples_to_build  # noqa: E402


@pytest.mark.parametrize(
    ("error", "reason", "has_trace"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", False),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied", False),
        (OSError("Matplotlib requires a folder"), "Matplotlib requires a folder", False),
        (torch.OutOfMemoryError("out of memory"), "out of memory", False),
        (MemoryError(), "MemoryError", False),
        (KeyError("ours"), "'ours'", True),
        (RuntimeError("Connection closed by peer"), "Connection closed by peer", True),
        (AssertionError(), "AssertionError", True),
    ],
)
def test_a_part_that_fails(
    error: Exception, reason: str, has_trace: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert attempt("the report", fail, "trinity-megatron report R writes it") is None
    said = capsys.readouterr().err
    line = f"> the report is not made: {reason}; trinity-megatron report R writes it\n"
    assert said.startswith(line) and ("Traceback" in said) == has_trace
    assert attempt("nothing", lambda: 3) == 3
    with pytest.raises(KeyboardInterrupt):
        attempt("x", lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_prompts(tmp_path: Path) -> None:
    """The second half of the longest document of the heaviest set, at most 64 tokens of it."""
    a, b = make_set(tmp_path / "a", 300), make_set(tmp_path / "b", 5, 30, 20)
    long = choose_prompt(arguments(valid_data_path=[a]))
    assert long is not None and long.tolist() == list(range(150, 214))
    short = choose_prompt(arguments(valid_data_path=["0.3", a, "0.7", b]))
    assert short is not None and short.tolist() == list(range(20, 35))
    share = choose_prompt(arguments(data_path=[b], split="70,30,0"))
    assert share is not None and share.tolist() == list(range(45, 55))
    one = choose_prompt(arguments(valid_data_path=[make_set(tmp_path / "one", 1)]))
    assert one is not None and one.tolist() == [0]
    assert choose_prompt(arguments(train_data_path=[a])) is None
    assert choose_prompt(arguments(valid_data_path=[make_set(tmp_path / "empty")])) is None
    assert choose_prompt(arguments(data_path=[b], split="100,0,0")) is None
    assert choose_prompt(arguments(mock_data=True)) is None


@pytest.fixture
def run_args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Arguments of a run of one rank, in a process group of one."""
    args = arguments(
        out=str(tmp_path / "run"), tensorboard_dir=str(tmp_path / "run/tensorboard"),
        iteration=0, train_iters=4, pipeline_model_parallel_size=1, context_parallel_size=1,
        data_parallel_size=1, do_test=False, padded_vocab_size=16,
    )  # fmt: skip
    writer = SummaryWriter(args.tensorboard_dir)
    for step in (1, 2, 3):
        writer.add_scalar("lm loss", 3.0 - step, step)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", writer)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield args
    torch.distributed.destroy_process_group()


def test_a_run_without_validation(run_args: Any, capsys: pytest.CaptureFixture[str]) -> None:
    finish_run([], 4, ValidationTokens())
    shown = capsys.readouterr()
    assert "Steps                 4, of which 0 before this start" in shown.out
    assert "with a larger --train-iters N" in shown.out
    assert (Path(run_args.out) / "report" / "report.html").is_file()
    assert "Validation" not in shown.out and shown.err == ""
    finish_run([], 2, ValidationTokens(), is_complete=False)
    assert "To go on              the same command\n" in capsys.readouterr().out


@pytest.mark.parametrize("blocker", ["report", "report/loss.png", "report/report.html"])
def test_a_report_that_cannot_be_written(
    blocker: str, run_args: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(run_args.out) / blocker
    if blocker == "report":
        path.symlink_to("/proc/self/fdinfo")  # where root cannot write either
    else:
        path.mkdir(parents=True)
    finish_run([], 4, ValidationTokens())
    shown = capsys.readouterr()
    assert (
        f"> the report is not made: {'' if blocker == 'report' else 'Is a directory'}" in shown.err
    )
    assert f"; trinity-megatron report {run_args.out} writes the report\n" in shown.err
    assert "Traceback" not in shown.err
    assert "Steps                 4" in shown.out and "Report  " not in shown.out


def test_a_missing_validation_file_costs_the_continuation_only(
    run_args: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_args.valid_data_path = ["/no/such/set"]
    finish_run([], 4, ValidationTokens())
    shown = capsys.readouterr()
    assert "> a continuation is not made: --valid-data-path /no/such/set: there is no" in shown.err
    assert "Report  " in shown.out


def test_a_bug_of_ours_keeps_its_trace(
    run_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_args.valid_data_path = [make_set(tmp_path / "v", 9)]
    finish_run([object()], 4, ValidationTokens())  # type: ignore[list-item]
    shown = capsys.readouterr()
    assert "> a continuation is not made: 'object' object has no attribute 'eval'" in shown.err
    assert "Traceback" in shown.err and "Report  " in shown.out


def test_an_interrupt_names_the_way_to_the_report(
    run_args: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(end_of_run, "RunLog", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finish_run([], 4, ValidationTokens())
    said = capsys.readouterr().err
    assert f"complete; trinity-megatron report {run_args.out} writes the report" in said


def test_an_evaluation_that_ended_early_has_no_entropy(run_args: Any) -> None:
    """--exit-duration-in-mins: the loss that stands is of an earlier one, of other tokens."""
    model = torch.nn.Linear(1, 1).eval()
    labels = torch.arange(run_args.seq_length).remainder(16).repeat(4, 1)
    loss_mask = (labels != 3).float()
    batches = run_args.eval_iters * run_args.eval_global_batch_size // 4
    validation = ValidationTokens()
    for _ in range(batches - 1):
        validation.observe(model, labels, loss_mask)
    assert validation.entropy() is None
    validation.observe(model, labels, loss_mask)
    assert validation.counts is not None
    expected = [4 * batches * run_args.seq_length // 16] * 16
    expected[3] = 0  # without loss
    assert validation.counts.tolist() == expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        # A run from the start is as Megatron counts it: evaluations at 5, 10 and the end.
        ({}, [40, 96, 32]),
        (
            {"iteration": 5, "consumed_train_samples": 20, "consumed_valid_samples": 32},
            [40, 96, 32],
        ),
        # Complete: no step is left, and Megatron's sampler wants one.
        (
            {"iteration": 10, "consumed_train_samples": 40, "consumed_valid_samples": 64},
            [41, 96, 32],
        ),
        # Past the end, and with more evaluations behind it than today's --eval-interval has.
        (
            {"iteration": 20, "consumed_train_samples": 80, "consumed_valid_samples": 640},
            [81, 672, 32],
        ),
        (
            {"iteration": 8, "consumed_train_samples": 32, "consumed_valid_samples": 256},
            [40, 320, 32],
        ),
        ({"skip_train": True, "consumed_train_samples": 40}, [40, 96, 32]),
        ({"phase_transition_iterations": [5], "consumed_train_samples": 40}, [40, 96, 32]),
    ],
)
def test_samples_of_a_resume(state: dict[str, Any], expected: list[int]) -> None:
    base = {"train_iters": 10, "eval_interval": 5, "phase_transition_iterations": None}
    base |= {"iteration": 0, "consumed_train_samples": 0, "consumed_valid_samples": 0}
    args = arguments(**{**base, **state})
    assert samples_to_build(args, [40, 96, 32]) == expected
    assert samples_to_build(args, [40, 0, 0])[1:] == [0, 0]
