"""What this machine has: versions, GPU, and which parts of the suite it can run."""

import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trinity_megatron.doctor.result import Deadline, PartResult, Settings, Table

NAME = "environment"
NOT_INSTALLED = "not installed"
WHEELS = "docs/gpu.md, section Wheels"
ROOT = Path(__file__).resolve().parents[2]
_MODULES = {  # distribution -> module by which it counts as installed
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine",
    "transformer-engine-torch": "transformer_engine_torch",
}


def check(settings: Settings, deadline: Deadline) -> PartResult:
    """Name versions and hardware, and what is missing."""
    import torch

    result = PartResult(NAME)
    rows = [
        ("Python", sys.version.split()[0]),
        ("torch", torch.__version__),
        ("CUDA of torch", str(torch.version.cuda or "none")),
        *((name, package_version(name)) for name in _MODULES),
        ("apex", apex()),
    ]
    rows += _gpu_rows(settings) if settings.on_gpu else [("device", f"CPU, {cpu_name()}")]
    result.tables.append(Table("Versions and hardware", ("what", "value"), rows))
    missing = [name for name, value in rows if value.startswith(NOT_INSTALLED)]
    if missing:
        result.notes.append(f"Not installed: {', '.join(missing)}; all are optional, see {WHEELS}.")
    if not settings.on_gpu:
        result.skipped.append(f"GPU, driver and FP8 recipes: {no_gpu(settings)}")
    return result


def _gpu_rows(settings: Settings) -> list[tuple[str, str]]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return [
        ("GPUs", str(torch.cuda.device_count())),
        ("GPU 0", properties.name),
        ("compute capability", f"{properties.major}.{properties.minor}"),
        ("memory", f"{properties.total_memory / 2**30:.1f} GiB"),
        ("driver", driver_version()),
        ("FP8 recipes of this GPU", ", ".join(recipes(settings)) or "none"),
    ]


def no_gpu(settings: Settings) -> str:
    """Why nothing runs on a GPU; empty if something does."""
    return "" if settings.on_gpu else "needs a CUDA device; the suite ran with --device cpu"


def missing_for_te(settings: Settings) -> str:
    """Why Transformer Engine cannot run; empty if it can."""
    if not settings.on_gpu:
        return no_gpu(settings)
    missing = [
        name for name in ("transformer-engine", "transformer-engine-torch") if not installed(name)
    ]
    return f"{' and '.join(missing)} {NOT_INSTALLED}, see {WHEELS}" if missing else ""


def recipes(settings: Settings) -> tuple[str, ...]:
    """FP8 recipes of GPU 0 with torch's CUDA, best first; none on a CPU."""
    import torch

    from trinity_megatron.model.fp8 import supported_recipes

    if not settings.on_gpu:
        return ()
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return supported_recipes(torch.cuda.get_device_capability(0), cuda=(int(major), int(minor)))


def device_name(settings: Settings) -> str:
    """Name of the GPU, or of the processor."""
    import torch

    return torch.cuda.get_device_name(0) if settings.on_gpu else cpu_name()


def installed(distribution: str) -> bool:
    """Whether a package of ``_MODULES`` can be found; nothing is imported."""
    return importlib.util.find_spec(_MODULES[distribution]) is not None


def package_version(distribution: str) -> str:
    """Version of a package of ``_MODULES``, or that it is not installed."""
    if not installed(distribution):
        return NOT_INSTALLED
    try:
        return version(distribution)
    except PackageNotFoundError:  # a build without metadata
        return "unknown version"


def apex() -> str:
    """Which part of NVIDIA Apex is there; the package of that name on PyPI is another project."""
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):
        return "NVIDIA Apex with fused weight gradients"
    if importlib.util.find_spec("amp_C"):
        return "NVIDIA Apex without fused weight gradients"
    return NOT_INSTALLED


def driver_version() -> str:
    """Version of NVIDIA's driver, by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: no nvidia-smi"


def cpu_name() -> str:
    """Architecture and number of cores of the machine."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Commit of the checkout, with a mark if files differ from it; empty without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
