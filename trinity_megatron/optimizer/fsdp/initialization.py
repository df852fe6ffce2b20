"""Parameters drawn shard by shard, so that no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from trinity_megatron.model.initialization import ParameterDraws, global_name
from trinity_megatron.optimizer.fsdp.managed_parameters import ManagedParameter


@torch.no_grad()
def initialize_shards(managed: Iterable[ManagedParameter], bare: Any) -> None:
    """Draw this rank's shards of every matrix, those of a model that is drawn whole.

    Args:
        managed: Parameters of a chunk that was wrapped after `set_matrices_aside`.
        bare: The model inside of the wrappers.
    """
    names = {id(param): name for name, param in bare.named_parameters()}
    for each in managed:
        if each.raw.dim() > 1:
            name = names.get(id(each.raw)) or names[id(each.distributed)]
            _draw(each, global_name(bare, name), bare)
        if each.has_masters:
            each.master().copy_(each.weight())


def _draw(each: ManagedParameter, name: str, bare: Any) -> None:
    """Draw the matrices that the shard has a part of, one at a time."""
    weight, start = each.weight(), each.start
    stop = start + weight.numel()
    draws = ParameterDraws(name, each.raw, bare)
    size = each.raw.shape[-2] * each.raw.shape[-1]
    for index in range(start // size, -(-stop // size)):
        first, last = max(start, index * size), min(stop, (index + 1) * size)
        matrix = draws.draw(index).view(-1)
        weight[first - start : last - start] = matrix[first - index * size : last - index * size]
