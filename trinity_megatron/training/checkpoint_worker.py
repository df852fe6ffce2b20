"""``--use-persistent-ckpt-worker`` without a GPU: the worker needs the host's stand-ins too."""

from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

_upstream_loop = PersistentAsyncCaller.async_loop


def enter_host_in_worker() -> None:
    """Let the process that saves in the background enter the host before it begins."""
    PersistentAsyncCaller.async_loop = staticmethod(_loop_on_host)  # type: ignore[method-assign]


def _loop_on_host(*args: Any) -> None:
    """What the worker runs; by name, as it is a fresh process."""
    enter_host()
    _upstream_loop(*args)
