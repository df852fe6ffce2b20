"""``--check-replicas N``: compare what data-parallel ranks hold alike.

Every N steps and before each save: a checksum of each parameter, expert bias and bias momentum, and
the count of consumed samples, in one small collective for dense parameters and one for experts.
Megatron's own check (``--check-weight-hash-across-dp-replicas-interval``) copies all weights to the
host and hashes them there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.training import force_param_sync, should_disable_forward_pre_hook
from torch import Tensor

from trinity_megatron.errors import MachineError
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.training.callbacks.gradient_check import latest_checkpoint

# Buffers that every data-parallel rank computes for itself from the same numbers, as it does the
# expert bias, which is a parameter.
_REPLICATED_BUFFERS = ("expert_bias_momentum",)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_NAMED = 3


class ReplicaCheck(Callback):
    """Compares the replicas of a run.

    Args:
        interval: Number of steps between two checks.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Compare after every so many steps; see :func:`check_replicas`."""
        if iteration % self._interval == 0:
            if should_disable_forward_pre_hook(get_args()):
                force_param_sync(model, optimizer=optimizer)  # else they come with the next step
            check_replicas(iteration, model)

    def on_checkpoint_save_start(
        self, iteration: int, model: Any, optimizer: Any, *, non_persistent: bool
    ) -> None:
        """Compare before each save, so that what is saved is right; see :func:`check_replicas`."""
        check_replicas(iteration, model)


def check_replicas(iteration: int, model: Sequence[Any]) -> None:
    """Compare checksums over data-parallel ranks; the host waits for the device once.

    Args:
        iteration: The step, for the message.
        model: Chunks of the model.

    Raises:
        MachineError: Ranks differ; names the tensors and the ranks.  On all ranks of the group.
    """
    dense, experts = split_by_group(model)
    consumed = torch.tensor(get_args().consumed_train_samples, device=torch.cuda.current_device())
    dense.append(("consumed samples", consumed))
    groups = (
        mpu.get_data_parallel_group(with_context_parallel=True),
        mpu.get_expert_data_parallel_group(),
    )
    compared = [
        (named, sums, group, _find_different(sums, group))
        for named, group in zip((dense, experts), groups, strict=True)
        if named and group.size() > 1
        for sums in [torch.stack([checksum(tensor) for _, tensor in named])]
    ]
    if not compared or not torch.cat([different for *_, different in compared]).any():
        return
    found = [
        line
        for named, sums, group, different in compared
        if different.any()
        for line in _name(named, sums, group, different)
    ]
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    raise MachineError(
        f"step {iteration}: data-parallel ranks do not hold the same numbers: "
        f"{'; '.join(found[:_MOST_NAMED])}{more}. A device or a link has changed a bit. "
        f"{latest_checkpoint()} Remedy: start again without the machine of that rank."
    )


type _Named = list[tuple[str, Tensor]]


def split_by_group(model: Sequence[Any]) -> tuple[_Named, _Named]:
    """Named tensors that all data-parallel ranks hold, and those of expert-data-parallel ranks."""
    dense: _Named = []
    experts: _Named = []
    for name, tensor in _named_tensors(model):
        (dense if getattr(tensor, "allreduce", True) else experts).append((name, tensor))
    return dense, experts


def _named_tensors(model: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    for chunk in unwrap_model(list(model)):
        yield from chunk.named_parameters()
        for name, buffer in chunk.named_buffers():
            if name.rpartition(".")[2] in _REPLICATED_BUFFERS:
                yield name, buffer


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the bits as integers, int64 scalar on the device: any single flipped bit changes it.

    Args:
        tensor: Of any shape and dtype.
    """
    plain = tensor.detach()
    if type(plain) not in (Tensor, torch.nn.Parameter):
        plain = plain.float()  # Transformer Engine's quantized weights
    return plain.contiguous().view(_BITS[plain.element_size()]).sum(dtype=torch.int64)


def _find_different(sums: Tensor, group: Any) -> Tensor:
    """Which checksums are not the same on all ranks: bool ``[tensors]`` on the device."""
    extremes = torch.cat([sums, -sums])  # the largest, and the smallest with a sign
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
    highest, lowest = extremes.chunk(2)
    return highest != -lowest


def _name(
    named: Sequence[tuple[str, Tensor]], sums: Tensor, group: Any, different: Tensor
) -> list[str]:
    """A line for each tensor that differs; all ranks of the group come here."""
    everyone = [torch.empty_like(sums) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, sums, group=group)
    table = torch.stack(everyone).cpu()
    ranks = torch.distributed.get_process_group_ranks(group)
    lines = []
    for index in different.nonzero().flatten().tolist():
        odd = find_odd(table[:, index].tolist())
        who = ", ".join(str(ranks[place]) for place in odd)
        lines.append(f"{named[index][0]} on rank{'s' * (len(odd) > 1)} {who}")
    return lines


def find_odd(values: Sequence[int]) -> list[int]:
    """Places whose value is not that of the majority; all of them where there is none."""
    (value, count), *_ = Counter(values).most_common(1)
    if 2 * count <= len(values):
        return list(range(len(values)))
    return [place for place, each in enumerate(values) if each != value]
