"""W&B in real trainings: one run over kills and resumes, and no trouble of it reaches the loss."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.functional_tests.launch import NARROW, ROOT, SMALL, TAKES_ALL, environment
from trinity_megatron.model.presets import trinity_preset
from trinity_megatron.planner.flops import training_flops_per_token
from trinity_megatron.telemetry.tensorboard_log import RunLog
from trinity_megatron.telemetry.wandb_file import read_records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 10
DEAD_SERVER = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
NO_WANDB = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "wandb":
            raise ImportError("No module named 'wandb'")

sys.meta_path.insert(0, Missing())
"""


@dataclass(frozen=True)
class Case:
    """One training: what disturbs it, and what it says about that.

    Attributes:
        at: Step before which ``action`` happens; 0: before the start.
        action: SIGKILL or a shell command; ``{folder}`` is the W&B folder.
        has: Step that W&B has by then.
        size: Size of a tmpfs to mount as W&B folder.
        says: Parts of the one line that is printed.
    """

    name: str
    environment: dict[str, str] = field(default_factory=lambda: {"WANDB_MODE": "offline"})
    at: int = 0
    action: str = ""
    has: int = 0
    size: str = ""
    flags: str = ""
    says: tuple[str, ...] = ()


FILL = "dd if=/dev/zero of={folder}/fill bs=64k"
CASES = (
    Case("undisturbed", {"WANDB_MODE": "disabled"}),
    Case(
        "killed",
        at=9,
        action="SIGKILL",
        has=6,
        flags="--save-interval 6 --log-throughput --log-timers-to-tensorboard",
    ),
    Case("dead_server", DEAD_SERVER, says=("http://127.0.0.1:9", "refused", "offline", "sync")),
    Case("fills", size="64m", at=7, action=FILL, has=5, says=("Its folder", "sync", "TensorBoard")),
)
if TAKES_ALL:
    CASES += (
        Case("full", size="1m", action=FILL, says=("is full", "Remedy: ", "TensorBoard")),
        Case("removed", at=7, has=5, action="rm -r {folder}/wandb", says=("removed", "TensorB")),
    )


@dataclass(frozen=True)
class Result:
    """What is left of a case."""

    code: int
    console: str
    loss: dict[int, float]
    folder: Path  # of W&B
    checkpoints: Path


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> bool:
    point = tmp_path_factory.mktemp("mount")
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], capture_output=True).returncode:
        return False
    subprocess.run(["umount", point], check=True)
    return True


def flags_of(case: Case, data: Path, folder: Path, checkpoints: Path) -> list[str]:
    flags = [*SMALL, "--data", str(data), "--tensorboard-dir", str(folder / case.name / "tb")]
    flags += ["--data-cache-path", str(folder / "data_cache"), "--train-iters", str(STEPS)]
    flags += ["--global-batch-size", "2"]
    flags += ["--wandb-project", "test", "--wandb-exp-name", case.name]
    flags += ["--wandb-save-dir", str(folder / case.name / "wandb_folder")]
    if case.flags:  # else nothing is saved: there is no id to keep
        flags += ["--save", str(checkpoints), "--load", str(checkpoints)]
    return [*flags, *case.flags.split()]


def job(case: Case, data: Path, folder: Path) -> dict[str, Any]:
    """As the worker reads it."""
    wandb_folder = folder / case.name / "wandb_folder"
    wandb_folder.mkdir(parents=True, exist_ok=True)
    if case.size:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={case.size}", "tmpfs", str(wandb_folder)]
        subprocess.run(mount, check=True)
    action = case.action.format(folder=wandb_folder)
    if action and not case.at:
        subprocess.run(action, shell=True, capture_output=True)
    return {
        "name": case.name,
        "flags": flags_of(case, data, folder, folder / case.name / "checkpoints"),
        "environment": case.environment,
        "console": str(folder / case.name / "console"),
        "at": case.at,
        "has": case.has,
        "action": action if case.at else "",
        "folder": str(wandb_folder),
    }


def clean_environment(folder: Path) -> dict[str, str]:
    kept = {n: v for n, v in environment().items() if not n.startswith("WANDB_")}
    return {**kept, "NETRC": str(folder / "netrc"), "WANDB_CONFIG_DIR": str(folder / "config")}


@pytest.fixture(scope="module")
def results(
    data: Path, tmp_path_factory: pytest.TempPathFactory, can_mount: bool
) -> Iterator[dict[str, Result]]:
    folder = tmp_path_factory.mktemp("wandb")
    cases = [case for case in CASES if can_mount or not case.size]
    jobs = [job(case, data, folder) for case in cases]
    killed = next(j for j in jobs if j["name"] == "killed")
    console = str(folder / "killed" / "console_resumed")
    jobs.append({**killed, "name": "resumed", "action": "", "console": console})
    plan = folder / "plan.json"
    plan.write_text(json.dumps(jobs))
    try:
        ended = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("wandb_worker.py")), str(plan)],
            env=clean_environment(folder),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr
        codes = json.loads(Path(f"{plan}.codes").read_text())
        yield {entry["name"]: result_of(entry, codes[entry["name"]], folder) for entry in jobs}
    finally:
        for case in cases:
            if case.size:
                subprocess.run(["umount", folder / case.name / "wandb_folder"])
        shutil.rmtree(folder, ignore_errors=True)


def result_of(entry: dict[str, Any], code: int, folder: Path) -> Result:
    console = Path(entry["console"])
    loss = RunLog(console.parent / "tb").scalars("lm loss")
    base = console.parent
    return Result(code, console.read_text(), loss, base / "wandb_folder", base / "checkpoints")


def records(file: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(content) for content in read_records(file.read_bytes())]


def rows(file: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            step = record.history.step.num
            assert step not in found and step > max(found, default=-1)
            found[step] = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
    return found


def offline_files(result: Result) -> list[Path]:
    return sorted(result.folder.glob("wandb/offline-run-*/*.wandb"))


def test_a_killed_and_resumed_run_is_one_run(results: dict[str, Result]) -> None:
    killed, resumed = results["killed"], results["resumed"]
    assert killed.code == -9 and resumed.code == 0, resumed.console
    files = offline_files(resumed)
    (run_id,) = {file.stem.removeprefix("run-") for file in files}
    assert len(files) == 2 and (resumed.checkpoints / "wandb_run_id").read_text().strip() == run_id
    parts = [rows(file) for file in files]
    steps = [step for part in parts for step in part]
    assert steps == list(range(1, STEPS + 1))
    loss = {step: row["lm loss"] for part in parts for step, row in part.items()}
    # The event files of TensorBoard hold fp32.
    assert loss == pytest.approx(results["undisturbed"].loss, rel=1e-6)
    assert all(
        {"learning-rate", "grad-norm"} <= set(row) for part in parts for row in part.values()
    )


def test_there_are_at_most_80_scalar_keys(results: dict[str, Result]) -> None:
    found = [rows(file) for file in offline_files(results["resumed"])]
    last = [row for part in found for row in part.values()]
    names = {name for row in last for name, value in row.items() if isinstance(value, int | float)}
    names = {name for name in names if not name.startswith("_")}  # wandb's own clock
    # None is a layer's: 60 layers have as many (the parity tests look at the names).
    assert 40 < len(names) <= 80, sorted(names)


def test_throughput_is_our_count_of_flops(results: dict[str, Result]) -> None:
    """Megatron's own count, which knows no windows, would be larger."""
    resumed = results["resumed"]
    pairs = zip(NARROW[::2], NARROW[1::2], strict=True)
    fields = {name.strip("-").replace("-", "_"): int(value) for name, value in pairs}
    config = trinity_preset("tiny", window_size=(15, 0), vocab_size=512, **fields)
    flops = training_flops_per_token(config, 64) * 64 * 2  # of the two sequences of a batch
    for row in (row for file in offline_files(resumed) for row in rows(file).values()):
        if "iteration-time" in row:  # not in the first step after a start
            assert row["throughput"] * row["iteration-time"] == pytest.approx(flops / 1e12)
    assert "throughput per GPU (TFLOP/s/GPU)" in resumed.console


def test_the_configuration_says_what_ran(results: dict[str, Result]) -> None:
    run = next(r.run for r in records(offline_files(results["resumed"])[0]) if r.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert config["git_commit"] == (head.stdout.strip() or None)  # None outside of a checkout
    assert set(config["versions"]) == {"trinity_megatron", "torch", "megatron-core"}
    assert config["train_iters"] == STEPS and config["moe_router_topk"] > 0
    assert run.project == "test" and run.display_name == "killed"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_trouble_reaches_the_training(case: Case, results: dict[str, Result]) -> None:
    if case.name not in results:
        pytest.skip("mount is not permitted here")
    if case.name == "killed":
        case, result = Case("resumed"), results["resumed"]
    else:
        result = results[case.name]
    assert result.code == 0, result.console
    assert result.loss == results["undisturbed"].loss and len(result.loss) == STEPS
    assert "Traceback" not in result.console and "Logging error" not in result.console
    lines = [line for line in result.console.splitlines() if "W&B" in line or "wandb:" in line]
    if case.name == "resumed":
        lines = [line for line in lines if "not sent again" not in line]
    assert len(lines) == bool(case.says), lines
    assert all(part in line for line in lines for part in case.says), lines


def test_what_was_logged_before_the_disk_was_full_is_kept(results: dict[str, Result]) -> None:
    if "fills" not in results:
        pytest.skip("mount is not permitted here")
    (file,) = offline_files(results["fills"])
    steps = list(rows(file))  # up to where wandb had written
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < STEPS


def test_wandb_is_not_installed(data: Path, tmp_path: Path, results: dict[str, Result]) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_WANDB)
    case = Case("missing")
    flags = flags_of(case, data, tmp_path, tmp_path / "checkpoints")
    variables = {**clean_environment(tmp_path), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "trinity_megatron.training", *flags],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert RunLog(tmp_path / "missing" / "tb").scalars("lm loss") == results["undisturbed"].loss
    (line,) = [line for line in (ended.stdout + ended.stderr).splitlines() if "W&B" in line]
    assert "No module named 'wandb'" in line and "pip install wandb" in line
