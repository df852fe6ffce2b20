"""Each fault that a machine can have, made here, gives the line that names it and its remedy."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional_tests.launch import TAKES_ALL
from trinity_megatron.doctor import devices, machine, packages, ranks, services
from trinity_megatron.doctor.finding import Finding, worst

ROOT = Path(__file__).resolve().parents[3]


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def install(folder: Path, name: str, version: str) -> None:
    """A distribution of which only the metadata are there."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_another_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "megatron-core", "0.18.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(packages.check_versions(["megatron-core[training]>=0.19.2,<0.20"]))
    assert finding.level == "red" and "0.18.0 is not tested" in finding.text
    assert "pip install 'megatron-core[training]>=0.19.2,<0.20'" in finding.remedy


def test_missing_package_and_markers() -> None:
    lines = ["no-such-package-of-ours>=1", "other-missing; extra == 'gpu'", "packaging"]
    assert [f.name for f in packages.check_versions(lines)] == ["no-such-package-of-ours"]
    assert only(packages.check_versions(["packaging"])).level == "green"


def test_apex_of_pypi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(packages.check_apex()).level == "green"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(packages.check_apex())
    assert finding.level == "red" and "pip uninstall apex" in finding.remedy
    (tmp_path / "amp_C.py").write_text("")  # NVIDIA's has it
    assert only(packages.check_apex()).level == "green"


def test_transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(packages.check_transformer_engine(on_gpu=False)).level == "green"
    assert only(packages.check_transformer_engine(on_gpu=True)).level == "yellow"
    (tmp_path / "torch.py").write_text("__version__ = '2.13.0'\n")
    engine = tmp_path / "transformer_engine"
    engine.mkdir()
    (engine / "__init__.py").write_text("")
    (engine / "pytorch.py").write_text("raise ImportError('undefined symbol: _ZN2at')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(packages.check_transformer_engine(on_gpu=True))
    assert finding.level == "red" and "undefined symbol: _ZN2at" in finding.text
    (engine / "pytorch.py").write_text("")
    assert only(packages.check_transformer_engine(on_gpu=True)).level == "green"


def test_folder_of_a_run(tmp_path: Path) -> None:
    finding = only(machine.check_folder(tmp_path / "new"))
    assert finding.level in ("green", "yellow") and "GiB free" in finding.text
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    finding = only(machine.check_folder(tmp_path / "file" / "out"))
    assert finding.level == "red" and "cannot be written" in finding.text


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_tmpfs(small_tmpfs: Path) -> None:
    findings = list(machine.check_folder(small_tmpfs))
    assert findings[-1].level == "red" and "No space left" in findings[-1].text
    assert only(machine.check_shared_memory(small_tmpfs)).level == "red"


def test_read_only_cache(small_tmpfs: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_tmpfs)], check=True)
    environment = {"HOME": str(tmp_path), "TRITON_CACHE_DIR": str(small_tmpfs / "triton")}
    finding = only(machine.check_caches(environment))
    assert finding.level == "red" and "Read-only" in finding.text
    assert finding.remedy.startswith("export TRITON_CACHE_DIR=")
    assert only(machine.check_caches({"HOME": str(tmp_path)})).level == "green"


def test_clock_of_the_file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(machine._check_clock("disk", tmp_path)) == []
    now = time.time
    for ahead, level in ((30, "yellow"), (-3600, "red")):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: now() + ahead)
        finding = only(machine._check_clock("disk", tmp_path))
        assert finding.level == level and "differ by" in finding.text


def test_wandb() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}"}
        assert only(services.check_wandb(environment)).level == "green"
    finding = only(services.check_wandb(environment, seconds=1))
    assert finding.level == "yellow" and "WANDB_MODE=offline" in finding.remedy
    assert only(services.check_wandb({**environment, "WANDB_MODE": "offline"})).level == "green"


TOPOLOGY = """\
        GPU0    GPU1    GPU2    NIC0    CPU Affinity
GPU0     X      NV18    {link}    PIX     0-47
GPU1    NV18     X      NV18    NODE    0-47
GPU2    {link}    NV18     X      NODE    48-95
NIC0    PIX     NODE    NODE     X
"""


def test_links() -> None:
    assert only(devices.check_links(TOPOLOGY.format(link="NV18"))).level == "green"
    finding = only(devices.check_links(TOPOLOGY.format(link="SYS")))
    assert finding.level == "yellow" and "1 of 3 pairs" in finding.text
    assert "GPU0 and GPU2: SYS" in finding.text
    assert list(devices.check_links("")) == []


def test_odd_rank_is_named() -> None:
    same = {"host": "a", "package torch": "2.13.0"}
    alike = [same, {**same, "host": "b"}]
    assert only(ranks.compare_facts(alike)).level == "green"
    finding = only(ranks.compare_facts([*alike, {"host": "c", "package torch": "2.12.0"}]))
    assert finding.level == "red"
    assert "rank 2 (c): 2.12.0" in finding.text and "the others: 2.13.0" in finding.text
    missing = only(ranks.compare_facts([*alike, {"host": "c"}]))
    assert "rank 2 (c): missing" in missing.text


def test_slow_pair_is_named() -> None:
    rates = {("a", "b"): 10e9, ("a", "c"): 9e9, ("b", "c"): 1e9}
    finding = only(ranks.describe_rates(rates))
    assert finding.level == "red" and "b and c: 1.00 GB/s" in finding.text
    rates["b", "c"] = 8e9
    assert only(ranks.describe_rates(rates)).level == "green"
    assert worst([finding, Finding("x", "green", "y")]) == "red"


@pytest.mark.skipif(not TAKES_ALL, reason="takes half a minute; TRINITY_TESTS=all")
def test_two_ranks_of_the_command(tmp_path: Path) -> None:
    install(tmp_path / "odd", "made-up-package", "1.0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank, paths in enumerate([[ROOT], [ROOT, tmp_path / "odd"]]):
        environment = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment.update(PYTHONPATH=os.pathsep.join(map(str, paths)), WANDB_MODE="offline")
        command = [sys.executable, "-m", "trinity_megatron.cli", "doctor", "--json"]
        command += ["--out", str(tmp_path / "out")]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    first, second = (process.communicate(timeout=300)[0] for process in processes)
    result = json.loads(first)
    assert second == ""
    assert result["worst"] == "red" and processes[0].returncode == 1
    (odd,) = (each for each in result["findings"] if each["name"].startswith("ranks"))
    assert odd["name"] == "ranks, package made-up-package"
    assert "1.0" in odd["text"]


@pytest.mark.skipif(not TAKES_ALL, reason="takes 15 s; TRINITY_TESTS=all")
def test_bandwidth_between_two_machines() -> None:
    code = (
        "import torch.distributed as dist\n"
        "from trinity_megatron.doctor.ranks import measure_pairs\n"
        "dist.init_process_group('gloo')\n"
        "print(measure_pairs(['a', 'b']))\n"
        "dist.destroy_process_group()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **world, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=300)[0] for process in processes)
    assert first == second and first.startswith("{('a', 'b'): ")
    assert float(first.split(": ")[1].rstrip("}\n")) > 1e7
