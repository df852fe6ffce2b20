"""Refuse to save a checkpoint that contains NaN or Inf.

Megatron stops at a loss or gradient that is NaN or Inf, one step after the weights became so: a
save in between would make that state the latest checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor

from trinity_megatron.cpu_host.numerics import largest_magnitudes
from trinity_megatron.errors import UserError
from trinity_megatron.optimizer.fsdp.wrapper import shards_of
from trinity_megatron.training.callbacks.callback import Callback

_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FiniteCheck(Callback):
    """Checks weights, buffers and the optimizer's state before each save."""

    def on_checkpoint_save_start(
        self, iteration: int, model: Any, optimizer: Any, *, non_persistent: bool
    ) -> None:
        """See :func:`check_is_finite`."""
        check_is_finite(iteration, model, optimizer)


def check_is_finite(iteration: int, model: Any, optimizer: Any) -> None:
    """Refuse a state with NaN or infinity, on all ranks if it is on one.

    Raises:
        UserError: Names the tensors, the ranks and the remedy.
    """
    names_here, is_spoilt = find_spoilt(model, optimizer)
    count = is_spoilt.sum(dtype=torch.int32)
    torch.distributed.all_reduce(count)
    if not count:  # the one wait for the device
        return
    mine = [name for name, is_bad in zip(names_here, is_spoilt.tolist(), strict=True) if is_bad]
    by_rank: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(by_rank, mine[:3])
    names = [f"{name} (rank {rank})" for rank, found in enumerate(by_rank) for name in found]
    more = int(count) - len(names[:3])
    raise UserError(
        f"step {iteration} is not saved: NaN or infinity in {', '.join(names[:3])}"
        f"{f' and {more} more tensors' if more else ''}. The latest checkpoint in "
        f"{get_args().save} stands. Remedy: start again from it with lower --lr and "
        "--decoupled-lr, or --iterations-to-skip the steps that spoilt it."
    )


def find_spoilt(model: Any, optimizer: Any) -> tuple[list[str], Tensor]:
    """Which of this rank's tensors hold NaN or infinity, without a wait for the device.

    Args:
        model: Chunks of the model.
        optimizer: Megatron's optimizer; None where there is none.

    Returns:
        Names of the tensors of floating point, and for each whether it does: bool ``[tensors]`` on
        the device.
    """
    named = list(_tensors(model, optimizer))
    local = [getattr(tensor, "_local_tensor", tensor).detach() for _, tensor in named]
    kept = [i for i, t in enumerate(local) if t.dtype in _CHECKED and t.numel()]
    device = torch.cuda.current_device()
    names = [named[i][0] for i in kept]
    if not kept:
        return names, torch.zeros(0, dtype=torch.bool, device=device)
    checked = [local[i] for i in kept]
    # The largest absolute value: NaN if there is one.
    if all(tensor.device.type == "cpu" for tensor in checked):
        largest = largest_magnitudes(checked)
    else:
        largest = list(torch._foreach_norm(checked, float("inf")))
    # States may lie on the host.
    return names, ~torch.stack([norm.to(device, torch.float32) for norm in largest]).isfinite()


def _tensors(model: Any, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for chunk in model:
        shards = shards_of(chunk)  # elsewhere parameters come and go
        yield from ((each.name, each.weight()) for each in shards)
        yield from chain([] if shards else chunk.named_parameters(), chunk.named_buffers())
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        states = getattr(getattr(part, "optimizer", None), "state", {})
        for param, state in states.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    shape = " x ".join(map(str, param.shape))
                    yield f"{key} of a parameter of {shape}", value
