"""What the MoE layer leaves behind."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


def test_dispatcher_keeps_nothing_of_the_graph(build: Callable[..., Any]) -> None:
    layer = build().decoder.layers[1].mlp
    # What a layer has whose experts are on several ranks.
    layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    inputs = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        inputs.append(weakref.ref(hidden))
        return layer(hidden)[0]

    hidden = torch.randn(16, 2, layer.config.hidden_size, requires_grad=True)
    tensor_parallel.checkpoint(forward, False, hidden).square().sum().backward()
    assert hidden.grad is not None and hidden.grad.any()
    recomputed = inputs[-1]()  # has the gradient, too
    assert len(inputs) == 2 and recomputed is None
