"""The Transformer Engine path against the local one: names, shapes, shardings and checkpoints.

The tests with the marker ``te`` build Transformer Engine's own modules, with a GPU or without: its
constructors ask for CUDA, but compute nothing.
"""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit_tests.te_models import (
    allow_construction,
    build_model,
    describe_parameters,
    describe_shards,
    metadata,
)


def test_transformer_engine_is_looked_at_only_when_asked_for() -> None:
    """Nothing of ours imports it, nor the module that needs it."""
    code = """
import sys
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
enter_host()
from trinity_megatron import layer_specs
assert "trinity_megatron.model.moe.te_experts" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_it_the_remedy_is_named(build: Callable[..., Any]) -> None:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(ValueError, match=r"not installed. Remedy: --transformer-impl local"):
        build(transformer_impl="transformer_engine")


def test_fp8_in_the_local_layers_is_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"fp8='e4m3'.*'local'.*transformer_engine"):
        build(fp8="e4m3")


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's constructors, with a GPU or without."""
    allow_construction(monkeypatch)


@pytest.mark.te
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_have_the_same_names_shapes_and_marks(
    dtype: torch.dtype, one_rank: None, transformer_engine: None
) -> None:
    models = [
        build_model(name, params_dtype=dtype, bf16=dtype == torch.bfloat16)
        for name in ("local", "transformer_engine")
    ]
    local, other = (describe_parameters(model) for model in models)
    assert other == local
    assert describe_shards(models[1]) == describe_shards(models[0])


@pytest.mark.te
@pytest.mark.parametrize("direction", ["to_te", "from_te"])
def test_a_checkpoint_moves_between_the_implementations(
    direction: str, one_rank: None, transformer_engine: None, tmp_path: Path
) -> None:
    from megatron.core import dist_checkpointing

    from trinity_megatron.model.initialization import initialize_parameters

    names = ["local", "transformer_engine"]
    source, target = (
        build_model(name) for name in (names if direction == "to_te" else names[::-1])
    )
    initialize_parameters([source])
    dist_checkpointing.save(source.sharded_state_dict(metadata=metadata()), str(tmp_path))
    for parameter in target.parameters():
        parameter.data.fill_(torch.nan)
    state = dist_checkpointing.load(
        target.sharded_state_dict(metadata=metadata()), str(tmp_path), strict="raise_all"
    )
    target.load_state_dict(state, strict=True)
    expected = source.state_dict()
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for name, buffer in target.named_buffers():
        if name in expected:
            assert torch.equal(buffer, expected[name]), name


@pytest.mark.te
def test_the_table_of_hugging_face_names_covers_it(
    one_rank: None, transformer_engine: None
) -> None:
    from trinity_megatron.checkpoint.param_mapping import (
        resolve,
        resolve_extra_state,
        resolve_momentum,
    )

    model = build_model("transformer_engine")
    keys = set(describe_shards(model))
    tensors = {row.megatron for row in (*resolve(model.config), *resolve_momentum(model.config))}
    # The keys of objects go without the layer: that is an axis of theirs.
    objects = {key for key in keys if key.endswith("_extra_state")}
    assert keys - objects == tensors
    assert {key.rpartition(".layers.")[2] for key in objects} == {
        key.rpartition(".layers.")[2].partition("/")[0] for key in resolve_extra_state(model.config)
    }


@pytest.mark.te
def test_muon_owns_the_same_matrices(one_rank: None, transformer_engine: None) -> None:
    from trinity_megatron.optimizer.param_groups import attach_muon_splits, is_adam_parameter

    found = []
    for name in ("local", "transformer_engine"):
        model = build_model(name)
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        attach_muon_splits(trained.items(), model.config)
        found.append(
            {
                key: (is_adam_parameter(parameter, key), getattr(parameter, "muon_split", None))
                for key, parameter in trained.items()
            }
        )
    assert found[0] == found[1]


@pytest.mark.te
def test_the_initial_weights_are_the_same(one_rank: None, transformer_engine: None) -> None:
    from trinity_megatron.model.initialization import initialize_parameters

    local, other = (build_model(name) for name in ("local", "transformer_engine"))
    initialize_parameters([local])
    initialize_parameters([other])
    expected = dict(local.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.te
def test_the_ends_and_the_head_stay_out_of_fp8(
    one_rank: None, transformer_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, what Megatron enters; and no module outside of a layer knows FP8."""
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch import quantization
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from trinity_megatron.model.fp8 import fp8_defaults

    for known in ("_FP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        monkeypatch.setattr(quantization, known, (True, ""))
    args = Namespace(
        fp8="e4m3", fp8_recipe=None, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2
    )
    fp8_defaults(args, (9, 0))
    model = build_model("transformer_engine", num_layers=6, **vars(args))

    def is_in_fp8(layer: int) -> bool:
        with get_fp8_context(model.config, layer):
            return bool(quantization.FP8GlobalStateManager.is_fp8_enabled())

    assert [is_in_fp8(layer) for layer in range(6)] == [False, True, True, True, False, False]
    outside = {
        name
        for name, module in model.named_modules()
        if isinstance(module, TransformerEngineBaseModule) and not name.startswith("decoder.layers")
    }
    routers = {name for name, _ in model.named_modules() if name.endswith("router")}
    assert not outside
    assert routers
    assert not any(
        isinstance(model.get_submodule(name), TransformerEngineBaseModule) for name in routers
    )
