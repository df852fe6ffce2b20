"""When the bias moves: once per successful optimizer step."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trinity_megatron.moe import finalize
from trinity_megatron.moe.expert_bias import smebu_update


@pytest.fixture
def model(build: Callable[..., Any]) -> Iterator[Any]:
    yield build(moe_router_bias_update_rate=0.1)
    finalize._Pending.routers, finalize._Pending.tokens_per_expert = (), None


class Alone:
    """A group of one rank."""

    @staticmethod
    def size() -> int:
        return 1


def set_counters(model: Any, seed: int) -> torch.Tensor:
    routers = finalize.find_routers([model])
    counts = torch.randint(1, 50, (len(routers), 8), generator=torch.Generator().manual_seed(seed))
    for router, row in zip(routers, counts, strict=True):
        router.local_tokens_per_expert.copy_(row)
    return counts


def state(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    routers = finalize.find_routers([model])
    bias = torch.stack([router.expert_bias.detach() for router in routers])
    return bias, torch.stack([router.expert_bias_momentum for router in routers])


def expected(before: tuple[torch.Tensor, torch.Tensor], counts: torch.Tensor) -> Any:
    return smebu_update(*before, counts, update_rate=0.1, momentum=0.5, clamp_scale=2.0)


def step_of_some_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()


def test_an_optimizer_step_commits_once(model: Any) -> None:
    before, counts = state(model), set_counters(model, 1)
    finalize.collect_counts([model], Alone())
    assert all(not r.local_tokens_per_expert.any() for r in finalize.find_routers([model]))
    # Nothing moves before the optimizer has stepped.
    assert all(torch.equal(*pair) for pair in zip(state(model), before, strict=True))
    for _ in range(2):  # Megatron chains several inner optimizers
        step_of_some_optimizer()
        after = state(model)
        assert all(torch.equal(*pair) for pair in zip(after, expected(before, counts), strict=True))


def test_counts_of_a_skipped_step_are_replaced(model: Any) -> None:
    before = state(model)
    set_counters(model, 2)
    finalize.collect_counts([model], Alone())  # its optimizer step never comes
    counts = set_counters(model, 3)
    finalize.collect_counts([model], Alone())
    step_of_some_optimizer()
    after = state(model)
    assert all(torch.equal(*pair) for pair in zip(after, expected(before, counts), strict=True))


def test_evaluation_does_not_count(model: Any) -> None:
    before = state(model)
    model.eval()
    assert finalize.find_routers([model]) == []
    finalize.collect_counts([model], Alone())
    step_of_some_optimizer()
    model.train()
    assert all(torch.equal(*pair) for pair in zip(state(model), before, strict=True))


def test_observers_see_the_update(model: Any) -> None:
    seen: list[finalize.BiasUpdate] = []
    remove = finalize.observe_bias_updates(seen.append)
    counts = set_counters(model, 4)
    finalize.collect_counts([model], Alone())
    step_of_some_optimizer()
    remove()
    (update,) = seen
    assert update.layer_numbers == (2, 3, 4)
    assert torch.equal(update.tokens_per_expert, counts)
    bias, momentum = state(model)
    assert torch.equal(update.expert_bias, bias)
    assert torch.equal(update.bias_momentum, momentum)
    set_counters(model, 5)
    finalize.collect_counts([model], Alone())
    step_of_some_optimizer()
    assert len(seen) == 1
