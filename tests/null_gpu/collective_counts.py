"""Counts the collectives of a rank: what a start, a step and a save ask of the network."""

import functools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

# Name of a collective of tensors: place of the argument whose size counts.
_TENSORS = {
    "all_reduce": 0,
    "broadcast": 0,
    "reduce": 0,
    "all_gather": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
    "gather": 0,
    "send": 0,
    "recv": 0,
}
# The same for pickled objects.
_OBJECTS = {
    "all_gather_object": 1,
    "gather_object": 0,
    "broadcast_object_list": 0,
    "scatter_object_list": 1,
}


class CollectiveCounts:
    """Stands around ``torch.distributed`` for the life of the process.

    Args:
        find_caller: Says where a collective of objects is called.
    """

    def __init__(self, find_caller: Callable[[], str]) -> None:
        self._find_caller = find_caller
        self._calls: Counter[tuple[str, int, str]] = Counter()
        self._bytes: Counter[tuple[str, int, str]] = Counter()
        self._depth = 0
        for name, place in (_TENSORS | _OBJECTS).items():
            self._wrap(name, functools.partial(self._measure, place, name in _OBJECTS))
        self._wrap("barrier", lambda args, kwargs: 0)
        self._wrap("new_group", lambda args, kwargs: 0)

    def take(self) -> list[dict[str, Any]]:
        """What was called since the last time, each with the number of ranks of its group."""
        rows = [
            {
                **dict(zip(("name", "ranks", "where"), key, strict=True)),
                "calls": calls,
                "bytes": self._bytes[key],
            }
            for key, calls in sorted(self._calls.items())
        ]
        self._calls.clear()
        self._bytes.clear()
        return rows

    def _wrap(self, name: str, measure: Any) -> None:
        original = getattr(torch.distributed, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:  # those of objects are made of those of tensors
                where = self._find_caller() if name in _OBJECTS else ""
                key = (name, self._group_size(name, args, kwargs), where)
                self._calls[key] += 1
                self._bytes[key] += measure(args, kwargs)
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        setattr(torch.distributed, name, wrapper)

    @staticmethod
    def _group_size(name: str, args: Any, kwargs: Any) -> int:
        if name == "new_group":
            ranks = args[0] if args else kwargs.get("ranks")
            return len(ranks) if ranks is not None else torch.distributed.get_world_size()
        groups = (each for each in args if isinstance(each, torch.distributed.ProcessGroup))
        return torch.distributed.get_world_size(kwargs.get("group") or next(groups, None))

    @staticmethod
    def _measure(place: int, is_object: bool, args: Any, kwargs: Any) -> int:
        """Bytes that this rank hands over or gets, the larger of both."""
        value = args[place] if place < len(args) else next(iter(kwargs.values()), None)
        if is_object:
            return len(pickle.dumps(value))
        tensors = value if isinstance(value, (list, tuple)) else [value]
        return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
