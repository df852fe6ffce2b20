"""The world of srun's and mpirun's tasks; the variables are those of real ones."""

from collections.abc import Mapping

import pytest

from trinity_megatron.process.world import complete_world, first_host, refuse_worlds_in_tasks

BATCH = {  # a batch script's shell; so is that of salloc, without SLURM_PROCID
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "6",
    "SLURM_NPROCS": "6",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "node[01-02]",
}
STEP = {  # task 4 of srun in it
    **BATCH,
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "2045313025",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29755"}


def place(world: Mapping[str, str]) -> tuple[str, ...]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(world[name] for name in names)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (STEP, ("4", "6", "1", "3", "node01")),
        ({**STEP, "MASTER_ADDR": "10.0.0.1"}, ("4", "6", "1", "3", "10.0.0.1")),
        ({**STEP, "WORLD_SIZE": "6"}, ("4", "6", "1", "3", "node01")),
        ({**STEP, "RANK": "2", "WORLD_SIZE": "6"}, ("2", "6", "1", "3", "node01")),
        ({**STEP, "PMI_RANK": "4", "PMI_SIZE": "6"}, ("4", "6", "1", "3", "node01")),
        (OPEN_MPI, ("1", "2", "1", "2", "127.0.0.1")),
        ({**STEP, **OPEN_MPI}, ("1", "2", "1", "2", "127.0.0.1")),  # mpirun in a job of Slurm
        ({**MPICH, **HERE}, ("1", "2", "1", "2", "127.0.0.1")),
        ({**STEP, **MPICH, **HERE}, ("1", "2", "1", "2", "127.0.0.1")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **HERE},
         ("1", "2", "0", "1", "127.0.0.1")),
        ({}, ("0", "1", "0", "1", "127.0.0.1")),
        (BATCH, ("0", "1", "0", "1", "127.0.0.1")),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
          "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
          "SLURM_NODEID": "0"}, ("0", "1", "0", "1", "127.0.0.1")),
    ],
)  # fmt: skip
def test_place_in_the_world(environment: dict[str, str], expected: tuple[str, ...]) -> None:
    assert place({**complete_world(environment), **environment}) == expected


def test_all_tasks_of_a_step_agree_on_a_port_of_their_own() -> None:
    tasks = [{**STEP, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"} for rank in range(6)]
    ports = {complete_world(task)["MASTER_PORT"] for task in tasks}
    other = complete_world({**STEP, "SLURM_STEP_ID": "4"})["MASTER_PORT"]
    assert len(ports) == 1 and other not in ports
    assert 1024 < int(other) < 32768


def test_torchrun_has_said_it_all() -> None:
    assert complete_world({**STEP, "TORCHELASTIC_RUN_ID": "x", "RANK": "3"}) == {}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, "RANK 1 is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE 4 is set without RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", **HERE}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE 'two' is no number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK '-1' is no number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT of a world of 2 ranks"),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE 1 contradicts SLURM_STEP_NUM_TASKS"),
        ({**STEP, "WORLD_SIZE": "12"}, "WORLD_SIZE 12 contradicts SLURM_STEP_NUM_TASKS"),
        ({**STEP, "SLURM_PROCID": "6"}, "Task 6 of 6"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK 1 is set and nothing says how many"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, "MASTER_ADDR of a world of 4 ranks"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT of a world of 2"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK 'x' is no number"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=rf"{words}.*Remedy: "):
        complete_world(environment)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node[01-04,7],gpu-a", "node01"),
        ("localhost", "localhost"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]n[3,5-9].x", "rack1n3.x"),
        ("gpu-a-[007]", "gpu-a-007"),
    ],
)
def test_first_machine_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("environment", [STEP, OPEN_MPI, MPICH])
def test_a_launcher_in_each_task_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"run of its own, of 2 ranks. Remedy: "):
        refuse_worlds_in_tasks(environment, 2)


@pytest.mark.parametrize("environment", [{}, BATCH, {**STEP, "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_NODEID": "0"}])  # fmt: skip
def test_a_launcher_in_one_task_is_not(environment: dict[str, str]) -> None:
    refuse_worlds_in_tasks(environment, 2)
