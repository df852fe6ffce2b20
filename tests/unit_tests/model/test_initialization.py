"""The drawn matrices: their distribution, and that they do not depend on the layout."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trinity_megatron.model.initialization import draw_matrix, initialize_parameters


def test_truncated_normal() -> None:
    config: Any = SimpleNamespace(init_seed=1, initializer_std=0.02)
    whole = draw_matrix("name", (1000, 1000), torch.empty(0), config)
    assert whole.abs().max() <= 3 * 0.02
    # The largest of a million draws lies within a thousandth of the cut.
    assert whole.abs().max() > 2.99 * 0.02
    # Standard deviation of a normal cut at 3 sigma: sqrt(1 - 6 phi(3) / (2 Phi(3) - 1)).
    density, mass = math.exp(-4.5) / math.sqrt(2 * math.pi), math.erf(3 / math.sqrt(2))
    expected = 0.02 * math.sqrt(1 - 6 * density / mass)
    # A million draws: one standard error is 0.07%.
    assert whole.std().item() == pytest.approx(expected, rel=4e-3)
    assert abs(whole.mean().item()) < 4 * 0.02 / 1000


def test_drawn_by_seed_and_name() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        config: Any = SimpleNamespace(init_seed=seed, initializer_std=0.02)
        return draw_matrix(name, (8, 8), torch.empty(0), config)

    torch.manual_seed(0)
    first = draw(1, "a")
    torch.manual_seed(1)
    assert torch.equal(draw(1, "a"), first)
    assert not torch.equal(draw(2, "a"), first) and not torch.equal(draw(1, "b"), first)


def test_every_matrix_of_the_model(build: Callable[..., Any]) -> None:
    model = build()
    sigma, depth = 0.5 / math.sqrt(64), 4
    seen: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert parameter.abs().max() <= 3 * sigma, name
            # The fewest elements are 8 x 64: one standard error of the deviation is 3%.
            assert parameter.std().item() == pytest.approx(0.987 * sigma, rel=0.12), name
            seen += [m for m in parameter.reshape(-1, *parameter.shape[-2:])]
        elif "post_attention_layernorm" in name or "post_mlp_layernorm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, depth**-0.5)), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert name.endswith("expert_bias") and not parameter.any(), name
    starts = {tuple(matrix.flatten()[:4].tolist()) for matrix in seen}
    assert len(starts) == len(seen), "two matrices are the same"


class Group:
    """Rank ``rank`` of ``size``: what initialization asks a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Shard(torch.nn.Module):
    """Parameters under the names of a model, cut as Megatron cuts them on a rank."""

    def __init__(self, model: Any, tp: Group, ep: Group) -> None:
        super().__init__()
        self.config = model.config
        self.pg_collection = SimpleNamespace(tp=tp, expt_tp=tp, ep=ep)
        self.decoder = SimpleNamespace(layers=model.decoder.layers)
        self._named = []
        for name, whole in model.named_parameters():
            shape = list(whole.shape)
            if ".mlp.experts." in name:
                shape[0] //= ep.size()
            if getattr(whole, "tensor_model_parallel", False):
                shape[whole.partition_dim] //= tp.size()
            part = torch.nn.Parameter(torch.empty(shape), requires_grad=whole.requires_grad)
            for field in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                if hasattr(whole, field):
                    setattr(part, field, getattr(whole, field))
            self._named.append((name, part))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self._named)


@pytest.mark.parametrize(("tp_size", "ep_size"), [(2, 1), (1, 2), (2, 4)])
def test_the_shards_are_parts_of_one_model(
    tp_size: int, ep_size: int, build: Callable[..., Any]
) -> None:
    model = build()
    shards = {}
    for tp in range(tp_size):
        for ep in range(ep_size):
            shard: Any = Shard(model, Group(tp, tp_size), Group(ep, ep_size))
            initialize_parameters([shard])
            shards[tp, ep] = dict(shard.named_parameters())
    for name, whole in model.named_parameters():
        if whole.dim() == 1:
            continue
        stacks = []
        for ep in range(ep_size):
            parts = [shards[tp, ep][name] for tp in range(tp_size)]
            if not getattr(whole, "tensor_model_parallel", False):
                assert all(torch.equal(part, parts[0]) for part in parts)
                stacks.append(parts[0])
            elif "linear_fc1" in name:  # each rank holds [its gate rows | its up rows]
                halves = zip(*(part.chunk(2, whole.partition_dim) for part in parts), strict=True)
                stacks.append(torch.cat([p for half in halves for p in half], whole.partition_dim))
            else:
                stacks.append(torch.cat(parts, whole.partition_dim))
        if ".mlp.experts." in name:
            assert torch.equal(torch.cat(stacks), whole), name
        else:
            assert all(torch.equal(stack, whole) for stack in stacks), name
