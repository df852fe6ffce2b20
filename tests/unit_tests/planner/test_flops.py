"""The FLOPs of training against every matrix product that a built model really makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trinity_megatron.model.presets import trinity_preset
from trinity_megatron.planner.flops import mean_attended_keys, training_flops_per_token

SEQUENCE, BATCH = 24, 2
aten = torch.ops.aten


class CountedProducts(TorchDispatchMode):
    """Counts 2 m k n of every matrix product, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (aten.mm, aten.bmm, aten._grouped_mm):
            a, b = args[0], args[1]
        elif packet in (aten.addmm, aten.baddbmm):
            a, b = args[1], args[2]
        else:
            return result
        self.names.add(packet.__name__)
        # Grouped: the rows (or, for the weights' gradients, the columns) are divided over groups,
        # so that m, k and n of all groups together are those of the two operands.
        if packet is aten._grouped_mm:
            self.flops += 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
        else:
            self.flops += 2 * a.numel() * b.shape[-1]
        return result


def attended_pairs(sequence: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, counted one by one."""
    return sum(
        1
        for query in range(sequence)
        for key in range(query + 1)
        if window is None or query - key < window
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_dense_layer": {"num_dense_layers": 0},
    "two_dense_layers_of_five": {"num_dense_layers": 2, "num_layers": 5},
    "no_grouped_queries": {"num_query_groups": 4},
    "wide_heads": {"kv_channels": 48},
    "top_five": {"moe_router_topk": 5},
    "wide_shared_expert": {"moe_shared_expert_intermediate_size": 48},
    "window_longer_than_sequence": {"window_size": (63, 0)},
    "global_every_second": {"global_attn_every_n_layers": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_products_of_a_built_model(name: str, build: Callable[..., Any]) -> None:
    model = build(**CONFIGS[name])
    config = model.config
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(config.vocab_size, (BATCH, SEQUENCE), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    with CountedProducts() as counted:
        model(tokens, positions, None, labels=tokens).sum().backward()
    # The products inside attention are one fused call each: two forward and four backward.
    pairs = sum(
        attended_pairs(SEQUENCE, None if config.is_global_layer(i) else config.window_size[0] + 1)
        for i in range(1, config.num_layers + 1)
    )
    attention = 6 * 2 * pairs * config.num_attention_heads * config.kv_channels * BATCH
    total = training_flops_per_token(config, SEQUENCE) * BATCH * SEQUENCE
    assert (counted.flops + attention) / total == pytest.approx(1, abs=1e-3)
    assert counted.names >= {"mm", "_grouped_mm"}
    assert "bmm" not in counted.names, "attention would be counted twice"


@pytest.mark.parametrize(("sequence", "window"), [(1, None), (7, None), (7, 3), (9, 9), (5, 8)])
def test_attended_keys(sequence: int, window: int | None) -> None:
    mean = mean_attended_keys(sequence, window)
    assert mean * sequence == pytest.approx(attended_pairs(sequence, window))


def test_large_at_8192() -> None:
    """The figures that the design of the full run rests on, GFLOP a token."""
    config = trinity_preset("large")
    total = training_flops_per_token(config, 8192) / 1e9
    assert total == pytest.approx(91.3, abs=0.1)
