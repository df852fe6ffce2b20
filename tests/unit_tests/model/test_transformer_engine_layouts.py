"""The shards of the Transformer Engine path against those of the local one, over layouts."""

from typing import Any

import pytest
import torch

from tests.unit_tests.te_models import (
    allow_construction,
    build_model,
    describe_parameters,
    describe_shards,
    fake_world,
)

LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
    "TP2xEP2 ETP1": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "TP2 ETP2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
}


@pytest.mark.te
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 3])
def test_shards_are_the_same_in_every_layout(
    layout: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    allow_construction(monkeypatch)
    fields: dict[str, Any] = dict(LAYOUTS[layout], pipeline_dtype=torch.float32, num_layers=4)
    fields["sequence_parallel"] = "tensor_model_parallel_size" in fields
    with fake_world(rank, 4, **LAYOUTS[layout]):
        models = [build_model(name, **fields) for name in ("local", "transformer_engine")]
        local, other = (describe_parameters(model) for model in models)
        assert other == local
        assert describe_shards(models[1]) == describe_shards(models[0])
