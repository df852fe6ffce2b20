"""``trinity-megatron plan``: what it prints, what it refuses, and that it comes at once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trinity_megatron.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
LARGE = ["plan", "--preset", "large", "--gpus", "2048", "--gpu", "b300"]
EP32 = ["--expert-model-parallel-size", "32"]


def test_json_has_these_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LARGE, *EP32, "--tokens", "17T", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) == {
        "layout", "memory_gib", "tokens_per_second_per_gpu", "step_seconds", "days",
    }  # fmt: skip
    assert set(plan["memory_gib"]) == {"peak", "reserved"}
    assert set(plan["tokens_per_second_per_gpu"]) == {"balanced", "learned"}
    low, high = plan["tokens_per_second_per_gpu"]["learned"]
    balanced = plan["tokens_per_second_per_gpu"]["balanced"]
    assert 0 < low < high < balanced
    assert plan["layout"]["expert_model_parallel_size"] == 32
    assert plan["memory_gib"]["peak"] < plan["memory_gib"]["reserved"]
    step = sum(plan["step_seconds"].values())
    assert balanced == pytest.approx(12288 * 8192 / step / 2048, rel=1e-4)
    assert plan["days"] == pytest.approx(17e12 / balanced / 2048 / 86400, rel=1e-3)
    assert main([*LARGE, *EP32, "--json"]) == 0
    assert "days" not in json.loads(capsys.readouterr().out)


def test_verify_builds_ranks_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["plan", "--preset", "tiny", "--gpus", "8", "--gpu", "b300", "--micro-batch-size", "1"]
    assert main([*tiny, "--expert-model-parallel-size", "2", "--json", "--verify"]) == 0
    printed = capsys.readouterr()
    assert "layout" in json.loads(printed.out)  # the comparison is on the other stream
    ranks = re.findall(r"^  rank (\d+), stage 0: .* optimizer .* \(plan", printed.err, re.MULTILINE)
    assert ranks == ["0", "4", "7"]
    counted, planned = re.findall(r"the model: (\S+) parameters \(plan (\S+)\)", printed.err)[0]
    assert counted == planned
    assert "  as planned: the largest difference of a term is 0." in printed.err


def test_text_names_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LARGE, *EP32, "--tokens", "17T", "--gpu-hour-usd", "3"]) == 0
    text = capsys.readouterr().out
    for words in ("what binds:", "would make it", "17T tokens:", "million USD", "fits", "learned"):
        assert words in text


def test_nano_is_warned_of_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--preset", "nano", "--gpus", "64", "--gpu", "b300", "--micro-batch-size", "4"]
    assert main([*flags, "--expert-model-parallel-size", "8", "--fp8-format", "hybrid"]) == 0
    assert "WARNING: FP8 runs at 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--expert-model-parallel-size", "7"], ["256", "Remedy", "divisors of 256"]),
        (["--expert-model-parallel-size", "0"], ["must be positive"]),
        (["--pipeline-model-parallel-size", "7"], ["--num-layers 60", "divisors of 60"]),
        (["--tensor-model-parallel-size", "16"], ["--num-query-groups 8", "at most 8"]),
        (
            [*EP32, "--global-batch-size", "3000"],
            ["--global-batch-size 3000", "--global-batch-size 2048"],
        ),
        ([*EP32, "--fp8-recipe", "nvfp9"], ["--fp8-recipe nvfp9", "Remedy"]),
        ([*EP32, "--use-megatron-fsdp", "--num-distributed-optimizer-instances", "3"], ["divisor"]),
        ([*EP32, "--overlap-moe-expert-parallel-comm"], ["not supported by the Trinity layers"]),
        ([*EP32, "--tokens", "many"], ["--tokens 'many'", "17T"]),
        ([*EP32, "--num-virtual-stages-per-pipeline-rank", "7"], ["60 layers"]),
        ([*EP32, "--context-parallel-size", "3"], ["--gpus 2048"]),
        ([*EP32, "--recompute-modules", "core_attn"], ["core_attn is not planned for"]),
    ],
)
def test_bad_input_is_refused_with_a_remedy(
    flags: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LARGE, *flags]) == 2
    error = capsys.readouterr().err
    assert "Remedy" in error and error.count("\n") == 1
    for message in messages:
        assert message in error


@pytest.mark.parametrize(
    "flags",
    [
        [*EP32, "--recompute-granularity", "selective"],
        ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "4", *EP32,
         "--num-virtual-stages-per-pipeline-rank", "5", "--expert-tensor-parallel-size", "1"],
        ["--expert-model-parallel-size", "8", "--use-megatron-fsdp", "--micro-batch-size", "2",
         "--outer-dp-sharding-strategy", "optim", "--recompute-granularity", "full"],
        [*EP32, "--fp8-format", "hybrid", "--recompute-granularity", "selective",
         "--grad-reduce-in-bf16", "--exp-avg-dtype", "bf16"],
    ],
)  # fmt: skip
def test_printed_flags_are_those_of_the_plan(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a plan tells to type, typed: the same layout."""
    assert main([*LARGE, *flags]) == 0
    printed = next(
        line.removeprefix("flags: ").split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("flags: ")
    )
    layouts = []
    for given in (flags, printed):
        assert main([*LARGE, *given, "--json"]) == 0
        layouts.append(json.loads(capsys.readouterr().out)["layout"])
    assert layouts[0] == layouts[1]


def test_mxfp8_needs_blackwell(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpu", "h100", *EP32, "--fp8-format", "hybrid", "--fp8-recipe", "mxfp8"]
    assert main([*LARGE, *flags]) == 2
    assert "compute capability 9.0" in capsys.readouterr().err


def test_context_parallelism_cuts_documents_of_one_sequence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--context-parallel-size", "4", "--dataloader-inter-document-masking"]
    assert main([*LARGE, *EP32, *flags]) == 0
    capsys.readouterr()
    assert main([*LARGE, *EP32, *flags, "--micro-batch-size", "2"]) == 2
    assert "--micro-batch-size 2 with" in capsys.readouterr().err


def test_plan_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys\nfrom trinity_megatron.cli.main import main\n"
        f"main({[*LARGE, *EP32, '--json']!r})\n"
        "print('HEAVY', *({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "HEAVY"
