"""Packages: versions and their tested range, optional ones, and what is replaced in Megatron."""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement

from trinity_megatron.doctor.finding import Finding

_IMPORT_SECONDS = 180
# Source: wheels of nvidia-resiliency-ext 0.6 on PyPI are for glibc 2.39.
_RESILIENCY_GLIBC = (2, 39)


def check_versions(requirements: Sequence[str] | None = None) -> Iterator[Finding]:
    """Installed packages against the range that this package was tested with.

    Args:
        requirements: Lines as in ``setup.cfg``; those of the installed package if None.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("trinity_megatron") or ()
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                "trinity_megatron", "yellow", "is not installed, only on the path",
                "pip install -e . in its checkout",
            )  # fmt: skip
            return
    wrong, right = [], []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            wrong.append((requirement.name, "is not installed", line))
        elif found not in requirement.specifier:
            wrong.append(
                (requirement.name, f"{found} is not tested ({requirement.specifier})", line)
            )
        else:
            right.append(f"{requirement.name} {found}")
    for name, text, line in wrong:
        yield Finding(name, "red", text, f"pip install '{line.split(';')[0].strip()}'")
    if not wrong:
        main = [text for text in right if text.startswith(("torch ", "megatron-core "))]
        yield Finding(
            "versions", "green", f"{len(right)} packages, {', '.join(main)}, "
            f"Python {sys.version.split()[0]}",
        )  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_apex() -> Iterator[Finding]:
    """NVIDIA Apex is optional; the package of that name on PyPI is an unrelated project."""
    found = importlib.util.find_spec("apex") is not None
    if found and importlib.util.find_spec("amp_C") is None:
        yield Finding(
            "apex",
            "red",
            "the package apex is not NVIDIA's, or was built without its extensions; Megatron "
            "would import it",
            "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex",
        )
    elif found:
        yield Finding("apex", "green", "NVIDIA Apex")
    else:
        yield Finding("apex", "green", "not installed, and not needed")


def check_transformer_engine(*, on_gpu: bool) -> Iterator[Finding]:
    """Transformer Engine imports, and was built for this torch."""
    build = "docs/gpu.md, section Wheels: build transformer-engine-torch against this torch"
    if importlib.util.find_spec("transformer_engine") is None:
        if on_gpu:
            yield Finding(
                "Transformer Engine", "yellow", "not installed: bf16 in local layers, no FP8",
                build,
            )  # fmt: skip
        else:
            yield Finding("Transformer Engine", "green", "not installed, and not needed on a CPU")
        return
    # In a process of its own: a library for another torch may end it.
    code = "import torch, transformer_engine.pytorch as te; print(torch.__version__)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_SECONDS
        )
        failure = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        is_broken = done.returncode != 0
    except subprocess.TimeoutExpired:
        failure, is_broken = [f"no answer within {_IMPORT_SECONDS} s"], True
    if is_broken:
        why = failure[0] if failure else "the import ended the process"
        yield Finding("Transformer Engine", "red", f"does not import: {why}", build)
    else:
        yield Finding("Transformer Engine", "green", _version("transformer-engine") or "imports")


def check_registry() -> Iterator[Finding]:
    """What this package replaces in Megatron against the sources that are installed."""
    from trinity_megatron.upstream.entries import REGISTRY
    from trinity_megatron.upstream.registry import check_upstream

    changed = check_upstream(REGISTRY.values(), allow_changes=True)
    if changed:
        yield Finding(
            "Megatron's sources",
            "red",
            f"{len(changed)} of {len(REGISTRY)} replaced functions differ, the first: {changed[0]}",
            "pip install megatron-core==0.19.2, or --allow-upstream-changes in a training",
        )
    else:
        yield Finding("Megatron's sources", "green", f"{len(REGISTRY)} replacements fit")


def check_resiliency() -> Iterator[Finding]:
    """The package that saves asynchronously; Megatron's own strategy stands in."""
    library, glibc = platform.libc_ver()
    version = _version("nvidia-resiliency-ext")
    if version:
        yield Finding("resiliency", "green", f"nvidia-resiliency-ext {version}")
        return
    numbers = tuple(int(part) for part in glibc.split(".")[:2]) if glibc else (0, 0)
    if library == "glibc" and numbers >= _RESILIENCY_GLIBC:
        text = f"nvidia-resiliency-ext is not installed (glibc {glibc} runs its wheels)"
        remedy = "pip install nvidia-resiliency-ext, or keep --async-strategy mcore (the default)"
    else:
        text = f"nvidia-resiliency-ext has no wheel for {library or 'this'} {glibc or 'system'}"
        remedy = "keep --async-strategy mcore (the default)"
    yield Finding("resiliency", "yellow", text, remedy)
