"""A Slurm of one node in a temporary folder: its own daemons on its own ports, as this user.

Debian's packages ``slurm-wlm`` have what it needs.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
# Jobs of the partition "high" take the machine from those of "low", which are requeued.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A requeued job may start when the credentials of its first life have expired.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MessageTimeout=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=240
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm.

    Attributes:
        variables: With which its commands find it.
    """

    variables: dict[str, str]

    def call(self, *command: str) -> str:
        """Run one of its commands; what it prints."""
        done = subprocess.run(command, env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, cwd: Path, *words: str, **more: str) -> str:
        """``sbatch`` in a folder; the number of the job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            env={**self.variables, **more},
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def why_not() -> str | None:
    """Why it cannot run here, if it cannot."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"needs {', '.join(missing)} (Debian: apt-get install slurm-wlm)" if missing else None


@contextlib.contextmanager
def one_node(folder: Path) -> Iterator[Slurm]:
    """Run Slurm in a folder until the block ends.

    Raises:
        AssertionError: It does not come up; with its logs.
    """
    config = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config.write_text(
        CONFIG.format(host=host, ports=free_ports(2), user=getpass.getuser(), folder=folder)
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{own.get('PATH', '')}:/usr/sbin:/sbin"
    slurm = Slurm({**own, "SLURM_CONF": str(config), "PATH": path})
    daemons = []
    try:
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            daemons.append(
                subprocess.Popen(
                    command,
                    env=slurm.variables,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        wait_for(lambda: is_idle(slurm), 60, lambda: logs_of(folder))
        yield slurm
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            daemon.wait(timeout=60)


def is_idle(slurm: Slurm) -> bool:
    """Whether the node is ready."""
    done = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=slurm.variables, capture_output=True, text=True
    )
    return "idle" in done.stdout


def logs_of(folder: Path) -> str:
    """The ends of the daemons' logs."""
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(is_so: Callable[[], object], seconds: float, explain: Callable[[], str]) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: It is not, after so many seconds.
    """
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, explain()
        time.sleep(0.2)
