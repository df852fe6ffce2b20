"""The launch scripts of ``examples/``: one set of flags each, right for the world they are for."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.functional_tests.launch import ROOT, TAKES_ALL, environment
from trinity_megatron.cli.main import main
from trinity_megatron.errors import UserError
from trinity_megatron.planner.flags import add_plan_flags
from trinity_megatron.planner.request import make_plan
from trinity_megatron.planner.text import describe_plan

EXAMPLES = ROOT / "examples"
# Preset -> ranks of the whole world.
WORLDS = {"tiny": 2, "nano": 64, "mini": 512, "large": 2048}
LAUNCHERS = ("03_train_torchrun.sh", "03_train_slurm.sh", "03_train_kubernetes.yaml")
# What goes on from a pretraining, and the flags that it adds.
LATER = {
    "06_anneal.sh": ("--branch-from", "runs/x", "--branch-step", "40", "--anneal-tokens"),
    "07_extend_context.sh": ("--pretrained-checkpoint", "--seq-length", "--context-parallel-size"),
}
# In every run of the tests: the cheapest and the largest world, each by another launcher.
ALWAYS = {("tiny", "03_train_torchrun.sh"), ("large", "03_train_slurm.sh")}


def command_of(preset: str, launcher: str) -> tuple[list[str], dict[str, str]]:
    """What a launcher runs on a machine, and the variables that it sets there."""
    path = EXAMPLES / f"trinity_{preset}" / launcher
    if path.suffix == ".sh":
        return ["bash", str(path)], {}
    container = pod_of(path)["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    return [*container["command"], *container["args"]], variables | {"JOB_COMPLETION_INDEX": "1"}


def pod_of(path: Path) -> dict:
    job = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]


def dry_run(
    preset: str, launcher: str, python: str, **more: str
) -> subprocess.CompletedProcess[str]:
    command, variables = command_of(preset, launcher)
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    variables = {**own, **variables, "DRY_RUN": "1", "PYTHON": python, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env={**variables, **more}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def flags_of(output: str) -> list[str]:
    """The flags of the training in the command that a dry run prints."""
    (line,) = [line for line in output.splitlines() if "pretrain_trinity.py" in line]
    words = shlex.split(line)
    return words[words.index("examples/pretrain_trinity.py") + 1 :]


@pytest.mark.parametrize("preset", WORLDS)
def test_launchers_differ_only_in_how_they_start_ranks(preset: str) -> None:
    same = {"DATA": "some data", "OUT": "out"}
    printed = [dry_run(preset, name, "true", **same) for name in LAUNCHERS]
    assert [done.returncode for done in printed] == [0, 0, 0], [done.stderr for done in printed]
    first, *others = (flags_of(done.stdout) for done in printed)
    assert others == [first, first]
    assert first[:6] == ["--preset", preset, "--data", "some data", "--out", "out"]
    torchrun, srun, pod = (done.stdout for done in printed)
    assert "torch.distributed.run" in torchrun and "--node-rank 1" in pod and "srun" in srun


@pytest.mark.parametrize("preset", WORLDS)
def test_every_launcher_starts_the_same_world(preset: str) -> None:
    folder = EXAMPLES / f"trinity_{preset}"
    text = (folder / "flags.sh").read_text()
    nodes, ranks = (
        int(re.search(rf"{name}=\$\{{{name}:-(\d+)\}}", text)[1])  # type: ignore[index]
        for name in ("NNODES", "RANKS_PER_NODE")
    )
    assert nodes * ranks == WORLDS[preset]
    batch = (folder / "03_train_slurm.sh").read_text()
    assert f"#SBATCH --nodes={nodes}\n" in batch and f"#SBATCH --ntasks-per-node={ranks}\n" in batch
    path = folder / "03_train_kubernetes.yaml"
    job = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    variables = {entry["name"]: entry["value"] for entry in pod_of(path)["containers"][0]["env"]}
    assert job["parallelism"] == job["completions"] == nodes == int(variables["NNODES"])
    limits = pod_of(path)["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu", limits.get("cpu")) == ranks


@pytest.mark.parametrize(
    ("preset", "launcher"),
    [
        pytest.param(
            preset,
            launcher,
            marks=[]
            if (preset, launcher) in ALWAYS
            else pytest.mark.skipif(not TAKES_ALL, reason="a part of make test-all"),
        )
        for preset in WORLDS
        for launcher in LAUNCHERS
    ],
)
@pytest.mark.slow
def test_a_dry_run_passes_for_the_whole_world(
    preset: str, launcher: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = dry_run(preset, launcher, sys.executable, DATA=str(data), OUT=str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    size = WORLDS[preset]
    assert f"every flag is right for {size:,} ranks" in done.stdout
    assert ("by the planner:" in done.stdout) == (preset != "tiny")
    assert not out.exists()


@pytest.mark.parametrize("preset", WORLDS)
def test_steps_have_numbers_and_print_what_they_would_do(preset: str) -> None:
    folder = EXAMPLES / f"trinity_{preset}"
    found = sorted(path.name for path in folder.glob("0*.sh"))
    steps = [
        ("01_prepare_data.sh", ["prepare-data --out"]),
        ("02_plan.sh", [f"plan --preset {preset}", "cli doctor"]),
        ("04_report.sh", ["report runs/x"]),
        ("05_export.sh", ["export --load runs/x/checkpoints --out runs/x/hf --format bf16"]),
    ]
    more = list(LATER) if preset in ("large", "tiny") else []
    assert found == sorted([*(name for name, _ in steps), *LAUNCHERS[:2], *more])
    variables = {"DRY_RUN": "1", "OUT": "runs/x", "SOURCE": "a b", "TOKENIZER": "t"}
    for name, words in steps:
        done = subprocess.run(
            ["bash", str(folder / name)],
            env={**os.environ, **variables, "PYTHON": "python3"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        for word in words:
            assert word in done.stdout, name


@pytest.mark.parametrize("preset", ["large", "tiny"])
@pytest.mark.parametrize("script", LATER)
def test_what_comes_after_a_pretraining_adds_flags_to_its_launcher(
    preset: str, script: str
) -> None:
    variables = {"DRY_RUN": "1", "PYTHON": "true", "DATA": "d", "PARENT": "runs/x", "STEP": "40"}
    done = subprocess.run(
        ["bash", str(EXAMPLES / f"trinity_{preset}" / script), "--seed", "5"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    flags = flags_of(done.stdout)
    assert flags[-2:] == ["--seed", "5"] and all(word in flags for word in LATER[script])


def plan_flags(folder: Path, **variables: str) -> list[str]:
    """The flags of ``trinity-megatron plan`` that an example's script gives."""
    printed = subprocess.run(
        ["bash", str(folder / "02_plan.sh")],
        env={**os.environ, **variables, "DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[0]
    words = shlex.split(printed)
    return words[words.index("plan") + 1 :]


@pytest.mark.skipif(not TAKES_ALL, reason="takes a minute each; TRINITY_TESTS=all")
@pytest.mark.parametrize("variables", [{}, {"SHARDED": "1"}], ids=["pipeline", "sharded"])
def test_ranks_of_large_are_as_planned(variables: dict[str, str]) -> None:
    flags = plan_flags(EXAMPLES / "trinity_large", **variables)
    done = subprocess.run(
        [sys.executable, "-m", "trinity_megatron.cli", "plan", *flags, "--verify"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "the model: 398,635,286,016 parameters (plan 398,635,286,016)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("  as planned: ")


@pytest.mark.parametrize("preset", ["nano", "mini", "large"])
def test_the_expected_figures_are_the_planners(preset: str) -> None:
    """The lines that a README quotes; with the kernel rates that come with this package."""
    folder = EXAMPLES / f"trinity_{preset}"
    parser = argparse.ArgumentParser()
    add_plan_flags(parser)
    args = parser.parse_args(plan_flags(folder))
    plan = make_plan(args, own_rates=True)
    text = describe_plan(plan)
    quoted = (folder / "README.md").read_text().split("```text\n")[1].partition("```")[0]
    assert quoted.count("\n") == 6
    for line in quoted.splitlines():
        assert line in text


LARGE = "--preset large --expert-model-parallel-size 8 --micro-batch-size 1".split()
FP8 = "--transformer-impl transformer_engine --fp8-format hybrid --fp8-recipe".split()
REFUSED = {
    "EP that does not divide the experts": (
        "b300", 2048, "--expert-model-parallel-size 6",
        ["--expert-model-parallel-size 6", "256", "divisors"],
    ),
    "MXFP8 on Hopper": ("h100", 2048, " ".join([*FP8, "mxfp8"]), ["mxfp8", "9.0"]),
    "a batch that does not divide": (
        "b300", 2048, "--expert-model-parallel-size 64 --global-batch-size 3000",
        ["--global-batch-size 3000"],
    ),
    "a batch that grows to one that does not divide": (
        "b300", 2048, "--pipeline-model-parallel-size 4 --step-batch-size-schedule "
        "'0:12288 4.9T:16383' --train-iters 9000", ["16383", "multiples of 512"],
    ),
    "CP with documents of several sequences": (
        "b300", 2048,
        "--context-parallel-size 2 --micro-batch-size 2 --dataloader-inter-document-masking",
        ["--context-parallel-size 2", "--dataloader-inter-document-masking"],
    ),
    "a world that is no multiple of a replica": (
        None, 2044, "--pipeline-model-parallel-size 4 --expert-model-parallel-size 8",
        ["2044 ranks", "multiple of 32"],
    ),
    "more than a GPU holds": ("h100", 2048, "", ["GiB", "do not fit 80 GiB"]),
    "no ranks": ("b300", 0, "", ["--world-size 0"]),
    "a flag of nothing": (
        "b300", 2048, "--expert-model-parallel-size 64 --no-such-flag", ["--no-such-flag"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.slow  # imports megatron.training
def test_what_cannot_start_is_refused_with_a_remedy(case: str, data: Path) -> None:
    from trinity_megatron.training.dry_run import check_run

    gpu, ranks, flags, messages = REFUSED[case]
    with pytest.raises(UserError, match="Remedy") as caught:
        check_run(
            [*LARGE, "--data", str(data), "--train-iters", "100", *shlex.split(flags)],
            world_size=ranks,
            gpu=gpu,
        )
    for message in messages:
        assert message in str(caught.value)


def test_verify_wants_a_gpu(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["dry-run", "--preset", "tiny", "--data", str(data), "--verify"]
    assert main([*command, "--world-size", "2"]) == 2
    assert "--verify builds ranks of a plan, which needs --gpu" in capsys.readouterr().err


@pytest.mark.skipif(not TAKES_ALL, reason="builds ranks; a part of make test-all")
def test_verify_builds_ranks(data: Path) -> None:
    command = [sys.executable, "-m", "trinity_megatron.cli", "dry-run", "--preset", "tiny"]
    command += ["--data", str(data), "--verify", "--world-size", "8", "--gpu", "h100"]
    command += ["--expert-model-parallel-size", "2", "--global-batch-size", "8"]
    done = subprocess.run(
        [*command, "--micro-batch-size", "1"],  # on its own: Megatron keeps what it has parsed
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 8 ranks, built without memory" in done.stderr
