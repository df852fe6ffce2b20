"""W&B: reachable, or switched off."""

import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from trinity_megatron.doctor.finding import Finding

_SECONDS = 3.0
_OFF = ("offline", "disabled", "dryrun")


def check_wandb(environment: Mapping[str, str], *, seconds: float = _SECONDS) -> Iterator[Finding]:
    """Whether a run can send its metrics.

    Args:
        environment: Of the process.
        seconds: To wait for an answer.
    """
    mode = environment.get("WANDB_MODE", "")
    if mode in _OFF:
        yield Finding("W&B", "green", f"WANDB_MODE={mode}: nothing is sent")
        return
    url = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=seconds).close()
    except OSError as error:
        yield Finding(
            "W&B", "yellow", f"{url.hostname}:{port} does not answer ({error.strerror or error})",
            "WANDB_MODE=offline, and wandb sync later; TensorBoard is written in any case",
        )  # fmt: skip
    else:
        yield Finding("W&B", "green", f"{url.hostname} answers")
