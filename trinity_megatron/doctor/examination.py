"""All lines of ``trinity-megatron doctor``."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from trinity_megatron.doctor import devices, machine, packages, services
from trinity_megatron.doctor.finding import Finding


def examine(folder: Path) -> list[Finding]:
    """Look at this machine.

    Args:
        folder: Where runs are written.
    """
    findings: list[Finding] = []
    for name, check in _checks(folder):
        try:
            findings += check()
        except Exception as error:  # one part that fails must not hide the others
            findings.append(
                Finding(
                    name,
                    "red",
                    f"could not be looked at: {type(error).__name__}: {error}",
                    "mend what the message names; with packages, install this one anew",
                )  # fmt: skip
            )
    return findings


def _checks(folder: Path) -> Iterator[tuple[str, Callable[[], Iterator[Finding]]]]:
    yield "versions", packages.check_versions
    yield "apex", packages.check_apex
    yield "GPU", devices.check_devices
    on_gpu = bool(devices.run_nvidia_smi("-L"))
    yield "Transformer Engine", lambda: packages.check_transformer_engine(on_gpu=on_gpu)
    yield "Megatron's sources", packages.check_registry
    yield "/dev/shm", machine.check_shared_memory
    yield "file limits", machine.check_limits
    yield f"disk {folder}", lambda: machine.check_folder(folder)
    yield "caches", lambda: machine.check_caches(os.environ)
    yield "W&B", lambda: services.check_wandb(os.environ)
    yield "resiliency", packages.check_resiliency
