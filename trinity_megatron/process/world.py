"""The world of ranks that srun or mpirun has started, in the variables that torch reads.

torchrun sets ``RANK`` and its companions; srun and the launchers of MPI say the same in names of
their own.  Source: the sections "output environment variables" of srun(1), and what Open MPI 4 and
MPICH 4 set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trinity_megatron.errors import UserError
from trinity_megatron.process.environment import (
    build_environment,
    choose_device,
    count_cores_of_tasks,
    count_cuda_devices,
)

# Below the ports that the kernel gives to connections (32768 on Linux).
_FIRST_PORT, _NUM_PORTS = 15000, 17000


@dataclass(frozen=True)
class Step:
    """The tasks that were started together with this one.

    Attributes:
        source: Who started them, and the variable that has ``size``.
        rank: Number of this task, of ``size``.
        local_rank: Its number on this machine, of ``local_size``.
        address: Machine of task 0; None if nothing says it.
        port: A port that all tasks derive alike; None if nothing tells jobs apart.
    """

    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None
    port: int | None


def find_step(environment: Mapping[str, str]) -> Step | None:
    """What srun or mpirun says of this task; None if neither has started it.

    A batch script and a shell in an allocation have Slurm's variables too, and ``SLURM_NTASKS`` of
    the whole job: only tasks of srun have those of a step.

    Raises:
        UserError: A variable has no sense, or the number of tasks is unknown.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return _open_mpi_step(environment)
    slurm = _slurm_step(environment) if "SLURM_STEP_NUM_TASKS" in environment else None
    if "PMI_SIZE" in environment and "PMI_RANK" in environment:
        size, rank = _number(environment, "PMI_SIZE"), _number(environment, "PMI_RANK")
        if slurm is None or (slurm.rank, slurm.size) != (rank, size):
            return _pmi_step(environment)
    if slurm is None and "PMIX_RANK" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            f"PMIX_RANK {environment['PMIX_RANK']} is set and nothing says how many ranks there "
            "are. Remedy: start with srun, Open MPI's mpirun or torchrun, or set RANK, WORLD_SIZE, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        )
    return slurm


def complete_world(environment: Mapping[str, str]) -> dict[str, str]:
    """``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` etc. where they are not set yet.

    Args:
        environment: Of this process; what it sets takes precedence.

    Returns:
        The variables to add; empty under torchrun.

    Raises:
        UserError: Two variables contradict each other, or one is missing; names them.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return {}
    step = find_step(environment)
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if step is None and not given:
        return single_rank_environment()
    _check_given(environment, step, given)
    world = {} if step is None else _variables(step)
    world = {name: value for name, value in world.items() if name not in environment}
    size = int({**world, **environment}["WORLD_SIZE"])
    if size == 1:
        return {n: v for n, v in single_rank_environment().items() if n not in environment}
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in {**world, **environment}]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} of a world of {size} ranks cannot be told from the "
            "environment. Remedy: set MASTER_ADDR to the machine of rank 0 and MASTER_PORT to a "
            "free port there, the same for all ranks (mpirun -x MASTER_ADDR -x MASTER_PORT)."
        )
    return world


def join_world() -> None:
    """Set the variables of the world and of this machine that are not set yet.

    Raises:
        UserError: Two variables contradict each other, or one is missing; names them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    world = complete_world(os.environ)
    os.environ.update(world)
    size = int(os.environ["WORLD_SIZE"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if "LOCAL_RANK" in world:
        local_rank = choose_device(os.environ, int(world["LOCAL_RANK"]), local_size)
        os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ.update(
        build_environment(
            os.environ,
            num_ranks=local_size,
            num_cores=count_cores_of_tasks(os.environ, local_size),
            cuda=count_cuda_devices() > 0,
            on_one_machine=local_size == size,
        )
    )


def single_rank_environment() -> dict[str, str]:
    """What torchrun would set for a world of one rank."""
    # The only member of a process group both serves and uses its store, so any free port will do.
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


def refuse_worlds_in_tasks(environment: Mapping[str, str], num_ranks: int) -> None:
    """Refuse a launcher in each of several tasks: every one would train alone.

    Raises:
        UserError: This process is one of several tasks.
    """
    step = find_step(environment)
    if step is not None and step.size > 1:
        raise UserError(
            f"{step.source} is {step.size}: each of these tasks would start a run of its own, of "
            f"{num_ranks} rank{'s' if num_ranks > 1 else ''}. Remedy: start the ranks themselves "
            "as tasks, python -m trinity_megatron.training in the place of trinity-megatron train, "
            "with the same flags but --nproc; or one task (srun --ntasks=1)."
        )


def first_host(nodes: str) -> str:
    """First of a list of machines in Slurm's notation, ``node[01-04,7],gpu-a``: ``node01``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST {nodes!r} names no machine. Remedy: set MASTER_ADDR.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def _check_given(environment: Mapping[str, str], step: Step | None, given: list[str]) -> None:
    if step is None and len(given) == 1:
        other = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise UserError(
            f"{given[0]} {environment[given[0]]} is set without {other}. Remedy: set both, or "
            "unset both to train on one rank."
        )
    size = _number(environment, "WORLD_SIZE") if "WORLD_SIZE" in given else None
    if size is not None and step is not None and size != step.size:
        # A launcher in each task that has ranks of its own sets LOCAL_RANK.
        if size < step.size or "LOCAL_RANK" not in environment:
            raise UserError(
                f"WORLD_SIZE {size} contradicts {step.source}, which is {step.size}. Remedy: unset "
                f"RANK and WORLD_SIZE, or start {size} task{'s' if size > 1 else ''}."
            )
    rank = _number(environment, "RANK") if "RANK" in given else None
    total = size if size is not None else step.size if step is not None else 1
    if total < 1 or (rank is not None and rank >= total):
        raise UserError(
            f"RANK {rank} is not below WORLD_SIZE {total}. Remedy: number the ranks from 0, or "
            "unset both to train on one rank."
        )


def _variables(step: Step) -> dict[str, str]:
    values = {
        "RANK": step.rank,
        "WORLD_SIZE": step.size,
        "LOCAL_RANK": step.local_rank,
        "LOCAL_WORLD_SIZE": step.local_size,
        "MASTER_ADDR": step.address,
        "MASTER_PORT": step.port,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _slurm_step(environment: Mapping[str, str]) -> Step:
    size, rank = (_number(environment, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    node = _number(environment, "SLURM_NODEID", 0)
    tasks = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    num_nodes = _number(environment, "SLURM_STEP_NUM_NODES", len(tasks) or 1)
    local_size = tasks[node] if node < len(tasks) else size if num_nodes == 1 else 1
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    address = "127.0.0.1" if local_size == size else first_host(nodes) if nodes else None
    return _checked(
        Step(
            source="SLURM_STEP_NUM_TASKS (of srun)",
            rank=rank,
            size=size,
            local_rank=_number(environment, "SLURM_LOCALID", 0),
            local_size=local_size,
            address=address,
            port=_port(f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"),
        )
    )


def _tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def _open_mpi_step(environment: Mapping[str, str]) -> Step:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    rank, size, local_rank, local_size = (
        _number(environment, f"OMPI_COMM_WORLD_{name}") for name in names
    )
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
    return _checked(
        Step(
            source="OMPI_COMM_WORLD_SIZE (of mpirun)",
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            address="127.0.0.1" if local_size == size else None,
            port=_port(job) if job else None,
        )
    )


def _pmi_step(environment: Mapping[str, str]) -> Step:
    size = _number(environment, "PMI_SIZE")
    local_size = _number(environment, "MPI_LOCALNRANKS", 1)
    return _checked(
        Step(
            source="PMI_SIZE (of mpirun)",
            rank=_number(environment, "PMI_RANK"),
            size=size,
            local_rank=_number(environment, "MPI_LOCALRANKID", 0),
            local_size=local_size,
            address="127.0.0.1" if local_size == size else None,
            # The environment does not tell two jobs apart, their proxies on this machine do.
            port=_port(str(os.getppid())) if _is_child_of_hydra() else None,
        )
    )


def _is_child_of_hydra() -> bool:
    name = Path(f"/proc/{os.getppid()}/comm")
    return name.is_file() and name.read_text().startswith("hydra")


def _checked(step: Step) -> Step:
    if not (0 <= step.rank < step.size and 0 <= step.local_rank < step.local_size <= step.size):
        raise UserError(
            f"Task {step.rank} of {step.size}, {step.local_rank} of {step.local_size} on this "
            f"machine, is impossible ({step.source}). Remedy: start it with srun or mpirun again, "
            "or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        )
    return step


def _port(job: str) -> int:
    # Not hash(): it differs from process to process.
    number = 0
    for character in job.encode():
        number = (number * 131 + character) % _NUM_PORTS
    return _FIRST_PORT + number


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        found = "is not set" if text is None else f"{text!r} is no number"
        raise UserError(
            f"{name} {found}. Remedy: let torchrun, srun or mpirun set it, or unset what you have "
            "set yourself."
        )
    return int(text)
