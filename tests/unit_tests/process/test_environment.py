"""The variables of a rank: threads, network, device."""

import pytest

from trinity_megatron.process import environment
from trinity_megatron.process.environment import build_environment, count_cores_of_tasks


@pytest.mark.parametrize(("num_ranks", "threads"), [(1, "8"), (3, "2"), (8, "1"), (16, "1")])
def test_ranks_share_the_cores(num_ranks: int, threads: str) -> None:
    values = build_environment({}, num_ranks=num_ranks, num_cores=8, cuda=False)
    assert values["OMP_NUM_THREADS"] == values["MKL_NUM_THREADS"] == threads


def test_environment_of_the_user_takes_precedence() -> None:
    base = {"OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "eth7", "HOME": "/h"}
    values = build_environment(base, num_ranks=2, num_cores=8, cuda=False)
    assert {key: values[key] for key in base} == base


def test_cpu_settings_are_not_set_for_gpus() -> None:
    only_cpu = {"TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"}
    on_cpu, on_gpu = (
        build_environment({}, num_ranks=2, num_cores=8, cuda=cuda) for cuda in (False, True)
    )
    assert on_cpu.keys() - on_gpu.keys() == only_cpu


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", None), ("200000 100000\n", 2), ("250000 100000\n", 2), ("50000 100000\n", 1)],
)
def test_cpu_limit_of_a_container(text: str, cores: int | None) -> None:
    assert environment.parse_cpu_limit(text) == cores


@pytest.mark.parametrize(
    ("base", "omp", "mkl"),
    [
        ({"OMP_NUM_THREADS": "1"}, "1", "1"),
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2"}, "3", "2"),
        ({"MKL_NUM_THREADS": "2"}, "4", "2"),
        ({"OMP_NUM_THREADS": "6,2"}, "6,2", "6"),
    ],
)
def test_threads_of_the_user_bind_mkl_too(base: dict[str, str], omp: str, mkl: str) -> None:
    values = build_environment(base, num_ranks=2, num_cores=8, cuda=False)
    assert (values["OMP_NUM_THREADS"], values["MKL_NUM_THREADS"]) == (omp, mkl)


@pytest.mark.parametrize(
    ("bound", "on_node", "num_tasks", "cores"),
    [(64, "64", 8, 64), (8, "64", 8, 64), (4, "8", 2, 8), (8, "8", 2, 8), (2, "", 2, 4)],
    ids=["unbound", "bound", "bound-part", "shared-part", "mpirun"],
)
def test_cores_of_tasks(
    bound: int, on_node: str, num_tasks: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "count_cores", lambda: bound)
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 64)
    given = {"SLURM_CPUS_ON_NODE": on_node} if on_node else {}
    assert count_cores_of_tasks(given, num_tasks) == cores


@pytest.mark.parametrize(
    ("visible", "on_node", "local_rank", "local_size", "device"),
    [(8, "8", 5, 8, 5), (1, "8", 5, 8, 0), (2, "8", 3, 4, 1), (0, "", 3, 4, 3)],
    ids=["all-visible", "one-each", "two-each", "cpu"],
)
def test_device_of_a_task(
    visible: int,
    on_node: str,
    local_rank: int,
    local_size: int,
    device: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "count_cuda_devices", lambda: visible)
    given = {"SLURM_GPUS_ON_NODE": on_node}
    assert environment.choose_device(given, local_rank, local_size) == device


@pytest.mark.parametrize(("visible", "on_node"), [(1, "1"), (3, "3"), (1, "")])
def test_more_tasks_than_devices_are_refused(
    visible: int, on_node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "count_cuda_devices", lambda: visible)
    with pytest.raises(ValueError, match=r"4 tasks .* CUDA devices\. Remedy: "):
        environment.choose_device({"SLURM_GPUS_ON_NODE": on_node}, 3, 4)
