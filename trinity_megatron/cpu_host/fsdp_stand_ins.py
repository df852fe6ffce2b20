"""Megatron-FSDP on a CPU host: replaces the literal ``cuda`` in its device meshes and wrapper."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributed import DeviceMesh

from trinity_megatron.upstream.registry import replaced

_FSDP = "megatron.core.distributed.fsdp"


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let models be wrapped in the block."""
    with ExitStack() as stack:
        stack.enter_context(replaced(f"{_FSDP}.mcore_fsdp_adapter:DeviceMesh", lambda _: _HostMesh))
        stack.enter_context(
            replaced(f"{_FSDP}.src.megatron_fsdp.megatron_fsdp:torch", lambda _: _HostTorch())
        )
        yield


class _HostMesh:
    """``DeviceMesh`` of CPU ranks, whatever device is named."""

    @staticmethod
    def from_group(groups: Any, device_type: str, **kwargs: Any) -> DeviceMesh:
        return DeviceMesh.from_group(groups, device_type="cpu", **kwargs)


class _HostTorch:
    """The module ``torch``, with the CPU for every device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *args: Any) -> torch.device:
        return torch.device("cpu")
