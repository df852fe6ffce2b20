"""``--use-persistent-ckpt-worker`` without a GPU: the worker needs the host's stand-ins too."""

from contextlib import AbstractContextManager
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.process.affinity import inherit_cores_of_parent
from trinity_megatron.upstream.registry import replaced

_LOOP = "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.async_loop"
_upstream_loop = PersistentAsyncCaller.async_loop


def host_in_worker() -> AbstractContextManager[None]:
    """Let the process that saves in the background enter the host before it begins."""
    return replaced(_LOOP, lambda _: _loop_on_host)


def _loop_on_host(*args: Any) -> None:
    """What the worker runs; by name, as it is a fresh process."""
    inherit_cores_of_parent()
    enter_host()
    _upstream_loop(*args)
