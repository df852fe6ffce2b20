"""Numbers that model-parallel ranks share after a step; one without peers asks no device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trinity_megatron.upstream.registry import replaced

_TRAINING = "megatron.training.training"


@contextmanager
def local_statistics() -> Iterator[None]:
    """Let a rank that has no model-parallel peers keep its numbers, while the block runs.

    Megatron copies each to the device, reduces it over a group of one, and waits for it.
    """
    with ExitStack() as stack:
        for name in (
            "logical_and_across_model_parallel_group",
            "reduce_max_stat_across_model_parallel_group",
        ):
            stack.enter_context(replaced(f"{_TRAINING}:{name}", _unless_alone))
        yield


def _unless_alone(reduce: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(value: Any, group: Any = None) -> Any:
        if group is not None and group.size() == 1:
            return value.item() if isinstance(value, torch.Tensor) else value
        return reduce(value, group)

    return wrapper
