"""When the bias moves: once per successful optimizer step."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trinity_megatron.model.moe import bias_update
from trinity_megatron.model.moe.expert_bias import smebu_update


@pytest.fixture
def model(build: Callable[..., Any]) -> Iterator[Any]:
    yield build(moe_router_bias_update_rate=0.1)


class Alone:
    """A group of one rank."""

    @staticmethod
    def size() -> int:
        return 1


def set_counters(model: Any, seed: int) -> torch.Tensor:
    routers = bias_update.find_routers([model])
    counts = torch.randint(1, 50, (len(routers), 8), generator=torch.Generator().manual_seed(seed))
    for router, row in zip(routers, counts, strict=True):
        router.local_tokens_per_expert.copy_(row)
    return counts


def state(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    routers = bias_update.find_routers([model])
    bias = torch.stack([router.expert_bias.detach() for router in routers])
    return bias, torch.stack([router.expert_bias_momentum for router in routers])


def expected(before: tuple[torch.Tensor, torch.Tensor], counts: torch.Tensor) -> Any:
    return smebu_update(*before, counts, update_rate=0.1, momentum=0.5, clamp_scale=2.0)


def step_of_its_optimizer(model: Any) -> None:
    parameter = next(model.parameters())
    parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()


def collect(model: Any) -> None:
    bias_update.get_expert_bias_updater([model]).collect([model], Alone())


def test_an_optimizer_step_commits_once(model: Any) -> None:
    before, counts = state(model), set_counters(model, 1)
    collect(model)
    assert all(not r.local_tokens_per_expert.any() for r in bias_update.find_routers([model]))
    # Nothing moves before the optimizer has stepped.
    assert all(torch.equal(*pair) for pair in zip(state(model), before, strict=True))
    for _ in range(2):  # Megatron chains several inner optimizers
        step_of_its_optimizer(model)
        after = state(model)
        assert all(torch.equal(*pair) for pair in zip(after, expected(before, counts), strict=True))


def test_two_models_do_not_move_each_other(build: Callable[..., Any]) -> None:
    models = [build(moe_router_bias_update_rate=0.1) for _ in range(2)]
    before = [state(model) for model in models]
    counts = [set_counters(model, seed) for seed, model in enumerate(models)]
    for model in models:
        collect(model)
    unrelated = torch.nn.Parameter(torch.zeros(1))
    unrelated.grad = torch.ones(1)
    torch.optim.SGD([unrelated], lr=0.1).step()
    step_of_its_optimizer(models[1])
    for index, wanted in enumerate((before[0], expected(before[1], counts[1]))):
        after = state(models[index])
        assert all(torch.equal(*pair) for pair in zip(after, wanted, strict=True))
    step_of_its_optimizer(models[0])
    after = state(models[0])
    assert all(
        torch.equal(*pair) for pair in zip(after, expected(before[0], counts[0]), strict=True)
    )


class Chain:
    """What Megatron's training loop takes ``grad_scale_func`` from."""

    def __init__(self, *optimizers: Any) -> None:
        self.chained_optimizers = [type("Part", (), {"optimizer": each}) for each in optimizers]

    def scale_loss(self, loss: Any) -> Any:
        return loss


def test_the_chain_of_the_training_loop_commits(model: Any) -> None:
    # Masters that are shards: none of them is a parameter of the model.
    masters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([master], lr=0.1) for master in masters]
    chain = Chain(*optimizers)
    model.config.grad_scale_func = chain.scale_loss
    for seed in range(2):
        before, counts = state(model), set_counters(model, seed)
        collect(model)
        for optimizer in optimizers:
            optimizer.step()
            after = state(model)
            wanted = expected(before, counts)
            assert all(torch.equal(*pair) for pair in zip(after, wanted, strict=True))


def test_counts_of_a_skipped_step_are_replaced(model: Any) -> None:
    before = state(model)
    set_counters(model, 2)
    collect(model)  # its optimizer step never comes
    counts = set_counters(model, 3)
    collect(model)
    step_of_its_optimizer(model)
    after = state(model)
    assert all(torch.equal(*pair) for pair in zip(after, expected(before, counts), strict=True))


def test_evaluation_does_not_count(model: Any) -> None:
    before = state(model)
    model.eval()
    assert bias_update.find_routers([model]) == []
    collect(model)
    step_of_its_optimizer(model)
    model.train()
    assert all(torch.equal(*pair) for pair in zip(state(model), before, strict=True))


def test_observers_see_the_update(model: Any) -> None:
    seen: list[bias_update.BiasUpdate] = []
    observers = bias_update.get_expert_bias_updater([model]).observers
    observers.append(seen.append)
    counts = set_counters(model, 4)
    collect(model)
    step_of_its_optimizer(model)
    observers.clear()
    (update,) = seen
    assert update.layer_numbers == (2, 3, 4)
    assert torch.equal(update.tokens_per_expert, counts)
    bias, momentum = state(model)
    assert torch.equal(update.expert_bias, bias)
    assert torch.equal(update.bias_momentum, momentum)
    set_counters(model, 5)
    collect(model)
    step_of_its_optimizer(model)
    assert len(seen) == 1


def test_counters_of_2048_ranks_in_any_order(model: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    router = bias_update.find_routers([model])[0]
    # Large: 65,536 tokens of a rank on 4 of 256 experts, skewed; here its 8 busiest.
    ranks = torch.randint(0, 40_000, (2048, 8), generator=generator)
    ranks += torch.arange(8) * 3000
    exact = [sum(column) for column in ranks.t().tolist()]  # Python's integers
    for _ in range(5):
        order = torch.randperm(2048, generator=generator)
        total = torch.zeros_like(router.local_tokens_per_expert)
        for index in order.tolist():  # a ring
            total += ranks[index]
        tree = ranks[order].to(total.dtype)
        while len(tree) > 1:
            tree = tree[0::2] + tree[1::2]
        assert total.tolist() == tree[0].tolist() == exact
    # The test has teeth: Megatron's counters in bf16, and fp32, would depend on the order.
    for dtype in (torch.bfloat16, torch.float32):
        ring = torch.zeros(8, dtype=dtype)
        for row in ranks.to(dtype):
            ring += row
        assert ring.long().tolist() != exact, dtype


@pytest.mark.parametrize(("step", "share"), [(1, 0.25), (3, 0.75), (4, 1.0), (6, 1.0), (7, 0.0)])
def test_warm_up_and_freezing(step: int, share: float, build: Callable[..., Any]) -> None:
    model = build(
        moe_router_bias_update_rate=0.1,
        moe_router_bias_warmup_steps=4,
        moe_router_bias_freeze_step=6,
    )
    bias_update.get_expert_bias_updater([model]).current_step = lambda: step
    before, counts = state(model), set_counters(model, step)
    collect(model)
    step_of_its_optimizer(model)
    moved = smebu_update(*before, counts, update_rate=0.1 * share, momentum=0.5, clamp_scale=2.0)
    after = state(model)
    # A product with another rounding.
    torch.testing.assert_close(after[0], moved[0], rtol=1e-6, atol=1e-9)
    assert bool(after[0].any()) == bool(share)
