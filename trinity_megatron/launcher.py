"""``trinity-megatron train``: start the ranks of a run on this machine.

It is torchrun over :mod:`trinity_megatron.training`, with the settings that a machine
needs filled in.  A run over several machines is launched by torchrun or srun over
``examples/pretrain_trinity.py``, which takes the same flags.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trinity_megatron.process import LAUNCHER_PID_VARIABLE

TRAINING_MODULE = "trinity_megatron.training"
# Importing the presets imports Megatron, which takes seconds: these are known to be there.
_RELEASED_PRESETS = ("tiny", "nano", "mini", "large")
_SHUTDOWN_SECONDS = 20
_NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
_CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def train(
    megatron_flags: Sequence[str], *, preset: str, data: str, out: str, nproc: int | None = None
) -> int:
    """Check the request, then train.

    Args:
        megatron_flags: Further flags, passed to Megatron as they are.
        preset: Name of a preset.
        data: Folder that ``prepare-data`` made.
        out: Folder of the run; made if missing.
        nproc: Number of ranks; one per CUDA device, or one on a CPU, if None.

    Returns:
        The exit code of the run.

    Raises:
        ValueError: An argument cannot be met.
        FileNotFoundError: ``data`` is missing or not complete.
    """
    check_preset(preset)
    check_out(out)
    check_data(data)
    num_devices = count_cuda_devices()
    num_ranks = choose_num_ranks(nproc, num_devices)
    arguments = ["--preset", preset, "--data", data, "--out", out, *megatron_flags]
    return launch(arguments, num_ranks=num_ranks, cuda=num_devices > 0)


def check_preset(preset: str) -> None:
    """Refuse a preset that does not exist.

    Raises:
        ValueError: No preset has this name.
    """
    if preset not in _RELEASED_PRESETS:
        from trinity_megatron.presets import get_preset

        get_preset(preset)


def check_data(data: str) -> None:
    """Refuse a data folder without complete, readable data.

    Raises:
        ValueError: What is there cannot be used.
        FileNotFoundError: Nothing is there.
    """
    from trinity_megatron.data.manifest import load_manifest

    load_manifest(Path(data))


def check_out(out: str) -> None:
    """Refuse an output folder that cannot be written.

    Raises:
        ValueError: The path is a file, or its folder is not writable.
    """
    if not out:
        raise ValueError("--out is empty: nothing would be saved. Remedy: name a folder.")
    path = Path(out).absolute()
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"--out {out} is a link to {path.readlink()}, which is not there. Remedy: mend it."
        )
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"--out {out}: {existing} is a file. Remedy: name a folder.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out}: {existing} is not writable. Remedy: name a folder that is.")


def choose_num_ranks(nproc: int | None, num_devices: int) -> int:
    """Number of ranks to start.

    Raises:
        ValueError: ``nproc`` is below one, or above the number of CUDA devices where there are any.
    """
    if nproc is None:
        return max(num_devices, 1)
    if nproc < 1:
        raise ValueError(
            f"--nproc {nproc} is below 1. Remedy: give the number of ranks, or leave "
            "it out for one per GPU."
        )
    if num_devices and nproc > num_devices:
        raise ValueError(
            f"--nproc {nproc} exceeds the {num_devices} CUDA devices that are visible. Remedy: "
            f"--nproc {num_devices}, or make more visible through CUDA_VISIBLE_DEVICES."
        )
    return nproc


def launch(
    arguments: Sequence[str],
    *,
    num_ranks: int,
    cuda: bool = False,
    module: str = TRAINING_MODULE,
) -> int:
    """Run ``python -m module arguments`` on ``num_ranks`` ranks of this machine until they end.

    One rank takes the place of this process.  Several are children of torchrun, which runs in this
    process: it stops them on SIGINT, SIGTERM, SIGHUP and SIGQUIT, kills what is left after 20 s,
    and they end with it if it is killed itself.

    Returns:
        0, the exit code of the rank that failed first, or 128 plus the number of a signal.
    """
    environment = build_environment(
        os.environ, num_ranks=num_ranks, num_cores=count_cores(), cuda=cuda
    )
    if num_ranks == 1:
        sys.stdout.flush()
        sys.stderr.flush()
        command = [sys.executable, "-u", "-m", module, *arguments]
        os.execve(sys.executable, command, {**environment, **single_rank_environment()})
    os.environ.update(environment)
    os.environ[LAUNCHER_PID_VARIABLE] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="trinity_megatron_") as folder:
        torchrun_arguments = build_torchrun_arguments(
            arguments, num_ranks=num_ranks, module=module, log_folder=folder
        )
        return _run_torchrun(torchrun_arguments)


def build_environment(
    base: Mapping[str, str], *, num_ranks: int, num_cores: int, cuda: bool
) -> dict[str, str]:
    """Environment of the ranks: ``base`` and what it does not set yet.

    Args:
        base: The user's environment, which takes precedence.
        num_ranks: Ranks on this machine.
        num_cores: Cores that this process may use.
        cuda: Whether the ranks use CUDA devices.
    """
    threads = str(max(num_cores // num_ranks, 1))
    defaults = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
    }
    if loopback := _loopback_interface():
        # All ranks are here; gloo would otherwise look up the host's name, which may not resolve.
        defaults["GLOO_SOCKET_IFNAME"] = loopback
    if not cuda:
        defaults["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes 18 s before the first CPU step
        defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron demands it for tensor parallelism
    return {**defaults, **base}


def build_torchrun_arguments(
    arguments: Sequence[str], *, num_ranks: int, module: str, log_folder: str
) -> list[str]:
    """What torchrun is called with.  It chooses a free port itself."""
    return [
        "--standalone",
        f"--nproc-per-node={num_ranks}",
        "--local-addr=127.0.0.1",
        f"--log-dir={log_folder}",
        # Not SIGINT: see _run_torchrun.
        "--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT",
        "-m",
        module,
        *arguments,
    ]


def count_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU limit of its container."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    if _CGROUP_CPU_LIMIT.is_file():
        cores = min(cores, parse_cpu_limit(_CGROUP_CPU_LIMIT.read_text()) or cores)
    return cores


def parse_cpu_limit(text: str) -> int | None:
    """Whole cores that a cgroup ``cpu.max`` grants, at least one; None if it sets no limit."""
    quota, period = text.split()
    return None if quota == "max" else max(int(quota) // int(period), 1)


def count_cuda_devices() -> int:
    """Number of visible CUDA devices, without importing torch where there is no driver."""
    if not any(Path(device).exists() for device in _NVIDIA_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count()


def _loopback_interface() -> str | None:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


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


def _run_torchrun(torchrun_arguments: Sequence[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    interrupted = False

    def stop(signum: int, frame: Any) -> None:
        # Ranks get SIGTERM, on which they can save and end; SIGINT would be a traceback from each.
        nonlocal interrupted
        interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, stop)
    if os.environ.get("TRINITY_DEBUG") != "1":
        logging.disable(logging.ERROR)  # torchrun's reports; the ranks have written their own
    try:
        run.run(run.parse_args(list(torchrun_arguments)))
    except ChildFailedError as error:
        return _report_failure(error)
    except SignalException as error:
        return 128 + (signal.SIGINT if interrupted else error.sigval)
    return 0


def _report_failure(error: Any) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        reason = f"ended with exit code {failure.exitcode}; its message is above"
    else:
        reason = f"was killed by {failure.signal_name()}"
    if failure.exitcode == -signal.SIGKILL:
        reason += ", as happens when memory runs out. Remedy: lower --micro-batch-size or --nproc"
    sys.stderr.write(f"trinity-megatron: rank {rank} {reason}. All other ranks were stopped.\n")
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
