"""The collectives by which Megatron-FSDP gathers weights and reduces gradients, written down."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

# The argument that has the bytes of the whole group: its number and its name.
_WHOLE = {
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "all_reduce": (0, "tensor"),
}


@contextmanager
def fsdp_traffic(prefix: str | None) -> Iterator[None]:
    """Write down every collective of the last step, from the clearing of the gradients on.

    The file has ``calls``, (name, bytes of the whole group's tensor, ranks of the group), and for
    each bucket of Megatron-FSDP what `_describe` says.

    Args:
        prefix: Of the files, one for each rank; nothing is written without.
    """
    from trinity_megatron.optimizer.fsdp.optimizer_chain import FsdpMuonOptimizer

    if prefix is None:
        yield
        return
    calls: list[tuple[str, int, int]] = []
    content: dict[str, Any] = {}
    step, zero_grad = FsdpMuonOptimizer.step, FsdpMuonOptimizer.zero_grad

    def recorded(self: Any) -> Any:
        result = step(self)
        (chunk,) = self.model_chunks
        groups = chunk.param_and_grad_buffer.parameter_groups
        content.update(calls=list(calls), buckets=[_describe(group) for group in groups])
        return result

    def cleared(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.clear()
        return zero_grad(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in _WHOLE:
            patch.setattr(torch.distributed, name, _counting(name, calls))
        patch.setattr(FsdpMuonOptimizer, "step", recorded)
        patch.setattr(FsdpMuonOptimizer, "zero_grad", cleared)
        yield
    torch.save(content, f"{prefix}.{torch.distributed.get_rank()}.pt")


def _counting(name: str, calls: list[tuple[str, int, int]]) -> Callable[..., Any]:
    original = getattr(torch.distributed, name)
    number, argument = _WHOLE[name]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tensor = kwargs[argument] if argument in kwargs else args[number]
        group = kwargs.get("group")
        calls.append((name, tensor.nbytes, torch.distributed.get_world_size(group)))
        return original(*args, **kwargs)

    return wrapper


def _describe(group: Any) -> dict[str, Any]:
    """Bytes of all ranks' weights and gradients, padding included, and who shares them."""
    weights, gradients = group.model_weight_buffer, group.main_grad_buffer
    return {
        "elements": sum(param.numel() for param in group.params),
        "weights": weights.bucket_index.size * weights.dtype.itemsize,
        "gradients": gradients.bucket_index.size * gradients.dtype.itemsize,
        "is_in_layer": group.fsdp_unit_id not in (None, -1),
        "ranks": weights.data_parallel_group.size(),
    }
