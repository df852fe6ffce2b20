"""The variables that a rank expects: threads, network and devices of its machine."""

import ctypes
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from trinity_megatron.errors import UserError

_CUDA_DRIVER = "libcuda.so.1"
_CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def build_environment(
    base: Mapping[str, str],
    *,
    num_ranks: int,
    num_cores: int,
    cuda: bool,
    on_one_machine: bool = True,
) -> dict[str, str]:
    """Environment of the ranks: ``base`` and what it does not set yet.

    Args:
        base: The user's environment, which takes precedence.
        num_ranks: Ranks on this machine.
        num_cores: Cores that they may use together.
        cuda: Whether the ranks use CUDA devices.
        on_one_machine: Whether the world has no ranks elsewhere.
    """
    threads = base.get("OMP_NUM_THREADS") or str(max(num_cores // num_ranks, 1))
    defaults = {
        "OMP_NUM_THREADS": threads,
        # torch takes the number of MKL for OpenMP too; a list is one number a nesting level.
        "MKL_NUM_THREADS": threads.split(",")[0].strip(),
    }
    if on_one_machine and (loopback := _loopback_interface()):
        # gloo would otherwise look up the host's name, which may not resolve.
        defaults["GLOO_SOCKET_IFNAME"] = loopback
    if not cuda and num_ranks == 1 and threads == str(count_affine_cores()):
        # A thread that shares its core with another process is waited for at every barrier; bound,
        # the threads at least never share a core with each other (docs/cpu.md has a table).
        defaults["OMP_PROC_BIND"] = "true"
    if not cuda:
        defaults["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes 18 s before the first CPU step
        defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron demands it for tensor parallelism
    return {**defaults, **base}


def count_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU limit of its container."""
    cores = count_affine_cores()
    if _CGROUP_CPU_LIMIT.is_file():
        cores = min(cores, parse_cpu_limit(_CGROUP_CPU_LIMIT.read_text()) or cores)
    return cores


def count_affine_cores() -> int:
    """Cores in the affinity of this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_cores_of_tasks(environment: Mapping[str, str], num_tasks: int) -> int:
    """Cores of all tasks on this machine, of which each may be bound to some or to none.

    Args:
        environment: Of a task.
        num_tasks: Tasks on this machine.
    """
    text = environment.get("SLURM_CPUS_ON_NODE", "")
    on_machine = int(text) if text.isdecimal() else os.cpu_count() or 1
    return min(count_cores() * num_tasks, on_machine)


def parse_cpu_limit(text: str) -> int | None:
    """Whole cores that a cgroup ``cpu.max`` grants, at least one; None if it sets no limit."""
    quota, period = text.split()
    return None if quota == "max" else max(int(quota) // int(period), 1)


def count_cuda_devices() -> int:
    """Number of visible CUDA devices, without importing torch where there is no driver."""
    try:
        ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        return 0
    import torch

    return torch.cuda.device_count()


def choose_device(environment: Mapping[str, str], local_rank: int, local_size: int) -> int:
    """Index of the CUDA device of a task among those that it sees.

    A task may see all devices of the machine, or those only that its launcher bound it to.

    Raises:
        UserError: There are more tasks than devices.
    """
    visible = count_cuda_devices()
    if visible == 0 or local_size <= visible:
        return local_rank
    text = environment.get("SLURM_GPUS_ON_NODE", "")
    found = int(text) if text.isdecimal() else len(list(Path("/dev").glob("nvidia[0-9]*")))
    if local_size > found:
        raise UserError(
            f"{local_size} tasks are on this machine and {max(found, visible)} CUDA devices. "
            f"Remedy: start {max(found, visible)} tasks, or ask for more devices (srun "
            "--gpus-per-node, CUDA_VISIBLE_DEVICES)."
        )
    return local_rank % visible


def _loopback_interface() -> str | None:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)
