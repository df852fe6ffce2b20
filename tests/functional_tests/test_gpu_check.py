"""The suite for GPU machines, in small on a CPU: every part runs, or says why it does not."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.functional_tests.launch import ROOT, TAKES_ALL, environment
from trinity_megatron.doctor import throughput
from trinity_megatron.doctor.main import PARTS, main
from trinity_megatron.doctor.profiler import kind_of, self_times
from trinity_megatron.doctor.suites import read_junit

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")


# `make test` leaves out two trainings of a part that says little on a CPU.
TAKEN = [part for part in PARTS if TAKES_ALL or part != "fp8_loss"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("suite")
    command = [sys.executable, "-m", "trinity_megatron.cli", "gpu-check", "--device", "cpu"]
    command += ["--out", str(out / "out"), "--report", str(out / "reports" / "report.md")]
    command += ["--parts", ",".join(TAKEN)]
    # In the checkout: its setup.cfg has the tests' markers.
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = (out / "reports" / "report.md").read_text()
    return SimpleNamespace(report=report, output=done.stdout)


def row(report: str, *cells: str) -> list[str]:
    """Cells of the one row of the report's tables that begins with these."""
    start = "| " + " | ".join(cells) + " |"
    (line,) = [line for line in report.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
@pytest.mark.parametrize("part", TAKEN)
def test_every_part_ran_or_says_why_not(part: str, suite: SimpleNamespace) -> None:
    status, _, reason = row(suite.report, part)[1:]
    assert f"{part} " in suite.output
    if part == "tests":
        assert status == "skipped" and "needs a CUDA device" in reason
    else:
        assert (status, reason) == ("passed", "")


@pytest.mark.slow
def test_the_report_has_figures(suite: SimpleNamespace) -> None:
    report = suite.report
    assert row(report, "megatron-core")[1].startswith("0.19")
    assert "logits" in row(report, "test_local_equals_float64[fp32]", "passed")[2]
    if TAKES_ALL:
        assert float(row(report, "bf16")[3]) < float(row(report, "bf16")[4]) == 0.05
    for balance in ("learned", "forced"):
        tokens, milliseconds = (row(report, "tiny", "fp32 local", balance)[i] for i in (4, 3))
        seconds = float(milliseconds.replace(",", "")) / 1e3
        # Both are rounded to whole numbers.
        expected = throughput.CPU_MODELS["tiny"].tokens / seconds
        assert float(tokens.replace(",", "")) == pytest.approx(expected, rel=0.02)
    for kind in ("gemm", "grouped gemm", "attention", "norm", "optimizer", "copies", "other"):
        (share,) = [
            line.split("|")[3]
            for line in report.splitlines()
            if line.startswith(f"| {kind} |") and line.count("|") == 4
        ]
        assert 0 < float(share.strip(" %")) < 100, kind


@pytest.mark.slow
def test_the_report_names_what_was_skipped(suite: SimpleNamespace) -> None:
    skipped = suite.report.partition("## Skipped")[2].partition("\n## ")[0]
    for what in (
        "FP8 recipes",
        "test_every_number_of_rows[blockwise]",
        "test_transformer_engine_is_as_exact_as_local",
        *["bf16 against FP8"] * TAKES_ALL,
        "Large-width",
        "CUDA kernels",
    ):
        (line,) = [line for line in skipped.splitlines() if what in line]
        assert "needs a CUDA device" in line
    assert "docs/gpu.md" in suite.report


@needs_no_cuda
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--parts", "numerics,speed"], ("--parts numerics,speed", "'speed'", "throughput")),
        (["--report", str(ROOT)], (f"--report {ROOT}", "folder")),
        (["--out", __file__], (f"--out {__file__}", "file")),
    ],
)
def test_refused(flags: list[str], expected: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        main(["--device", "cpu", *flags])
    assert all(part in str(error.value) for part in (*expected, "Remedy: "))


def event(category: str, name: str, stream: int, start: float, duration: float) -> dict[str, Any]:
    return {"cat": category, "name": name, "pid": 0, "tid": stream, "ts": start, "dur": duration}


def test_kernels_belong_to_the_optimizer_by_time_and_else_by_name() -> None:
    trace = [
        event("gpu_user_annotation", "Optimizer.step#Muon.step", 7, 100, 50),
        event("kernel", "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", 7, 10, 30),
        event("kernel", "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", 7, 110, 20),
        event("kernel", "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", 9, 120, 5),  # another stream
        event("kernel", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 7, 50, 8),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 7, 60, 2),
        event("cpu_op", "aten::mm", 7, 0, 1000),
        {"ph": "M", "name": "process_name", "pid": 0},
    ]
    times: dict[str, float] = {}
    for (kind, _), value in self_times(trace, on_gpu=True).items():
        times[kind] = times.get(kind, 0) + value
    assert times == {"gemm": 30, "optimizer": 25, "attention": 8, "copies": 2}


def test_an_operator_does_not_count_what_it_calls() -> None:
    trace = [
        event("cpu_op", "aten::linear", 1, 0, 100),
        event("cpu_op", "aten::t", 1, 5, 10),
        event("cpu_op", "aten::mm", 1, 20, 70),
        event("cpu_op", "aten::copy_", 1, 30, 20),
        event("cpu_op", "aten::mm", 2, 20, 70),  # another thread
    ]
    times = {name: value for (_, name), value in self_times(trace, on_gpu=False).items()}
    assert times == {"aten::linear": 20, "aten::t": 10, "aten::mm": 120, "aten::copy_": 20}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel<GroupProblemShape>>", ""),
        ("void transformer_engine::normalization::rmsnorm_fwd_general_kernel", "norm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "gemm"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>", "copies"),
        ("triton_poi_fused_mul_silu_0", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == (kind or "grouped gemm")


def test_goals_and_memory_of_a_gpu_run() -> None:
    models = throughput.GPU_MODELS
    large = models["Large-width"]
    bf16 = throughput._Row("Large-width", "bf16 TE", False, ())
    fp8 = throughput._Row("Large-width", "FP8 blockwise", False, ())
    total = 60e9
    measured = {
        bf16: throughput._Measured(1.0, 0.3, total),
        fp8: throughput._Measured(0.75, 0.3, total),
    }
    rate = large.tokens / 0.75
    assert throughput._goal(bf16, large.tokens, 0.39, measured, models).endswith("NOT REACHED")
    assert throughput._goal(fp8, rate, 0.5, measured, models).endswith("1.33, reached")
    table = throughput._memory_table(measured, models)
    for line in table.rows:
        assert len(line) == len(table.columns)
        *terms, total_term, peak, ratio = (float(cell) for cell in line[3:])
        assert total_term == pytest.approx(sum(terms), abs=0.03)  # rounded
        assert ratio == pytest.approx(peak / total_term, abs=0.01)


@pytest.mark.slow
@needs_no_cuda
@pytest.mark.parametrize("name", throughput.GPU_MODELS)
def test_the_arithmetic_is_of_the_model_that_is_trained(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from megatron.training.arguments import parse_args

    from trinity_megatron.doctor.fp8_loss import fp8_flags
    from trinity_megatron.training.arguments.parser import add_trinity_args

    model = throughput.GPU_MODELS[name]
    flags = [*model.command_line(16), *fp8_flags("blockwise"), *throughput._ALL_LAYERS]
    monkeypatch.setattr(sys, "argv", ["train", *flags, *throughput._FORCED])
    args, config = parse_args(add_trinity_args), model.config()
    for field in "num_layers num_dense_layers hidden_size moe_ffn_hidden_size".split():
        assert getattr(args, field) == getattr(config, field), field
    assert args.num_experts == config.num_moe_experts
    assert args.make_vocab_size_divisible_by == config.vocab_size
    assert args.bias_swiglu_fusion == config.bias_activation_fusion
    assert args.seq_length * args.global_batch_size == model.tokens


def test_tests_that_fail_or_are_skipped_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(
        "<testsuites><testsuite>"
        '<testcase name="a"><properties><property name="x" value="1"/></properties></testcase>'
        '<testcase name="b"><failure message="no"/></testcase>'
        '<testcase name="c"><error message="no"/></testcase>'
        '<testcase name="d"><skipped message="needs a CUDA device"/></testcase>'
        "</testsuite></testsuites>"
    )
    outcome = read_junit(path)
    assert outcome.tests == [("a", "passed", "x 1"), ("b", "failed", ""), ("c", "failed", "")]
    assert outcome.skipped == ["d: needs a CUDA device"]
