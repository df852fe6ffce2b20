"""Rank 0 of a world of any size on the null device, every other rank being imagined.

WORLD_SIZE=2048 python -m tests.null_gpu.fake_world STEPS.jsonl --fake-process-group FLAGS ...

Megatron's fake process group carries nothing.  Here every rank says what this one says, and the
router, which computes nothing, gives each expert the same number of tokens.
"""

import functools
from typing import Any

import torch
from megatron.core.transformer.moe import token_dispatcher

from tests.null_gpu import train
from trinity_megatron.optimizer.sharded import sharded_parameters
from trinity_megatron.optimizer.sharded.sharded_parameters import _Stage

# The ranks that share this rank's Muon matrices, of the group that is made next.
_sharing: list[int] = []


def say_the_same(objects: list, own: Any, group: Any = None) -> None:
    """In the place of ``all_gather_object``; other pipeline stages have other ranks."""
    objects[:] = [own] * len(objects)
    if isinstance(own, tuple):  # the first rank of a group: all others are in one more group
        others = min(set(range(len(objects))) - set(_sharing), default=0)
        objects[:] = [own if r in _sharing else (others, own[1]) for r in range(len(objects))]
    if isinstance(own, _Stage):
        distance = torch.distributed.get_world_size() // len(objects)
        objects[:] = [_moved(own, number * distance) for number in range(len(objects))]


def _moved(stage: _Stage, distance: int) -> _Stage:
    """The same stage on ranks further on."""
    table = {rank: rank + distance for ranks in stage.shard_ranks for rank in ranks}
    ranks = [[table[rank] for rank in some] for some in stage.shard_ranks]
    return _Stage(ranks, [stack.renumbered(table) for stack in stage.stacks])


class BalancedSplits:
    """Gives the dispatcher the counts of tokens that an even routing would give it."""

    def __init__(self) -> None:
        self._rows = 0  # copies of this rank's tokens in the micro-batch
        self._preprocess = token_dispatcher.MoEAlltoAllTokenDispatcher.preprocess
        self._move = token_dispatcher.maybe_move_tensor_to_cpu

    def preprocess(self, dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
        """Note the number of copies."""
        self._rows = routing_map.shape[0] * dispatcher.config.moe_router_topk
        return self._preprocess(dispatcher, routing_map)

    def move(self, tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """A table of counts on its way to the host: every entry the same, with this sum."""
        moved = self._move(tensor, as_numpy=as_numpy, record_stream=record_stream)
        if not isinstance(tensor, torch.Tensor):
            return moved
        even = torch.full(tensor.shape, self._rows // max(tensor.numel(), 1), dtype=torch.int64)
        return even.numpy() if as_numpy else even


def main() -> None:
    """Train as ``train.py`` does."""
    splits = BalancedSplits()
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher

    # Wrapped: the registry of replacements knows what is behind them.
    @functools.wraps(dispatcher.preprocess)
    def preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        return splits.preprocess(self, routing_map)

    exchange = torch.distributed.all_to_all_single

    def all_to_all_single(
        output: torch.Tensor, own: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # The fake group refuses a rank that only receives.
        return exchange(output, own, *args, **kwargs) if own.numel() else None

    torch.distributed.all_to_all_single = all_to_all_single
    torch.distributed.all_gather_object = say_the_same
    make_group = sharded_parameters._make_group

    def note_ranks(ranks: list[int], *args: Any) -> Any:
        _sharing[:] = ranks
        return make_group(ranks, *args)

    sharded_parameters._make_group = note_ranks
    move = functools.wraps(token_dispatcher.maybe_move_tensor_to_cpu)(
        lambda *args, **kwargs: splits.move(*args, **kwargs)
    )
    token_dispatcher.maybe_move_tensor_to_cpu = move
    dispatcher.preprocess = preprocess
    train.main()


if __name__ == "__main__":
    main()
