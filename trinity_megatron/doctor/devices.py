"""GPUs, their driver and links, and the backend that ranks talk with."""

import re
import subprocess
from collections.abc import Iterator

from trinity_megatron.doctor.finding import Finding

_SECONDS = 30


def check_devices() -> Iterator[Finding]:
    """Driver, GPUs, recipes and backend; on a machine without a GPU: gloo."""
    import torch

    cuda = torch.version.cuda
    listed = run_nvidia_smi("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if listed:
            yield Finding(
                "GPU", "red", f"{len(listed)} by nvidia-smi ({listed[0]}), and torch "
                f"{torch.__version__} cannot use them",
                "a driver for torch's CUDA "
                f"({cuda or 'none: torch is a CPU build'}), and CUDA_VISIBLE_DEVICES unset",
            )  # fmt: skip
        else:
            yield Finding("GPU", "green", "none: this machine trains on its CPU, over gloo")
        return
    names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    text = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, {(listed or ['?'])[0]}"
    if len(names) > 1:
        yield Finding(
            "GPU", "red", f"of different kinds: {text}", "CUDA_VISIBLE_DEVICES of one kind"
        )
    else:
        yield Finding("GPU", "green", text)
    yield from _check_recipes(cuda or "0.0")
    if torch.distributed.is_nccl_available():
        numbers = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("backend", "green", f"NCCL {numbers}")
    else:
        yield Finding(
            "backend", "red", "torch has no NCCL", "pip install torch (Linux, CUDA build)"
        )
    yield from check_links("\n".join(run_nvidia_smi("topo", "-m")))


def _check_recipes(cuda: str) -> Iterator[Finding]:
    import torch

    from trinity_megatron.model.fp8 import supported_recipes

    major, minor = (int(part) for part in cuda.split(".")[:2])
    capability = torch.cuda.get_device_capability(0)
    names = supported_recipes(capability, cuda=(major, minor))
    where = f"compute capability {capability[0]}.{capability[1]}"
    text = f"bf16; FP8: {', '.join(names) or 'none'} ({where})"
    if capability < (8, 0):
        yield Finding(
            "recipes", "red", f"{text}: no bf16", "a GPU of compute capability 8.0 or later"
        )
    else:
        yield Finding("recipes", "green", text)


def check_links(topology: str) -> Iterator[Finding]:
    """Links between the GPUs of a node.

    Args:
        topology: What ``nvidia-smi topo -m`` prints.
    """
    rows = [
        line.split() for line in topology.splitlines() if re.match(r"\x1b?\[?\d*m?GPU\d+\s", line)
    ]
    count = len(rows)
    slow = [
        f"{row[0]} and GPU{column}: {row[1 + column]}"
        for number, row in enumerate(rows)
        for column in range(number + 1, min(count, len(row) - 1))
        if not row[1 + column].startswith("NV")
    ]
    if count < 2:
        return
    if slow:
        yield Finding(
            "links",
            "yellow",
            f"{len(slow)} of {count * (count - 1) // 2} pairs have no NVLink ({slow[0]})",
            "expert parallelism within NVLink; on an SXM board: nvidia-fabricmanager",
        )
    else:
        yield Finding("links", "green", f"NVLink between all {count} GPUs")


def run_nvidia_smi(*arguments: str) -> list[str]:
    """Lines that nvidia-smi prints; none where it is missing or fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []
