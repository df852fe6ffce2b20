"""The table of names against the models of both sides."""

import random
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from transformers import AfmoeForCausalLM

from tests.reference.hf_afmoe import hf_config, hf_state_dict
from trinity_megatron.checkpoint.param_mapping import (
    Entry,
    resolve,
    resolve_extra_state,
    resolve_momentum,
)
from trinity_megatron.checkpoint.transforms import Shape
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.presets import trinity_preset


def random_config(seed: int) -> TrinityConfig:
    """All sizes different where they can be, so that no two dimensions can be mixed up."""
    draw = random.Random(seed)
    num_layers, groups = draw.randint(2, 6), draw.choice([1, 2, 3])
    experts, expert_width = draw.randint(4, 13), draw.choice([6, 10, 14])
    return trinity_preset(
        "tiny",
        num_layers=num_layers,
        num_dense_layers=draw.randint(0, num_layers - 1),
        hidden_size=draw.choice([40, 44, 52]),
        ffn_hidden_size=draw.choice([58, 62, 66]),
        num_attention_heads=groups * draw.choice([1, 2, 8]),
        num_query_groups=groups,
        kv_channels=draw.choice([16, 18, 22]),
        num_moe_experts=experts,
        moe_ffn_hidden_size=expert_width,
        moe_shared_expert_intermediate_size=expert_width * draw.randint(1, 3),
        vocab_size=draw.randint(100, 200),
    )


def twin_shapes(config: TrinityConfig) -> dict[str, Shape]:
    """What transformers holds in memory."""
    with torch.device("meta"):
        twin = AfmoeForCausalLM(hf_config(config))
    return {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}


def hub_shapes(in_memory: dict[str, Shape]) -> dict[str, Shape]:
    """The layout of the released files: design/trinity.md 1.7, "hub checkpoint layout"."""
    shapes: dict[str, Shape] = {}
    for name, shape in in_memory.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            count, both, hidden = shape
            for expert in range(count):
                place = f"{name.removesuffix('gate_up_proj')}{expert}"
                shapes[f"{place}.gate_proj.weight"] = (both // 2, hidden)
                shapes[f"{place}.up_proj.weight"] = (both // 2, hidden)
        elif name.endswith("mlp.experts.down_proj"):
            count, hidden, width = shape
            for expert in range(count):
                place = f"{name.removesuffix('down_proj')}{expert}"
                shapes[f"{place}.down_proj.weight"] = (hidden, width)
        else:
            shapes[name] = shape
    return shapes


def named_shapes(entries: list[Entry]) -> dict[str, Shape]:
    pairs = [pair for entry in entries for pair in entry.hf.items()]
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    assert not twice
    return dict(pairs)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stacked_experts", [True, False])
def test_hugging_face_side(seed: int, stacked_experts: bool) -> None:
    config = random_config(seed)
    entries = resolve(config, stacked_experts=stacked_experts)
    in_memory = twin_shapes(config)
    expected = in_memory if stacked_experts else hub_shapes(in_memory)
    assert named_shapes(entries) == expected
    assert sum(map(prod, expected.values())) == config.num_parameters()
    # Every number of every tensor has a place in Megatron.
    covered: Counter[str] = Counter()
    for entry in entries:
        for block in entry.blocks:
            covered[block.hf_name] += prod(block.hf_shape)
    assert covered == {name: prod(shape) for name, shape in expected.items()}


@pytest.mark.parametrize("name", ["nano", "mini", "large"])
def test_released_sizes(name: str) -> None:
    config = trinity_preset(name)
    entries = resolve(config)
    assert sum(map(prod, named_shapes(entries).values())) == config.num_parameters()
    assert sum(prod(entry.shape) for entry in entries) == config.num_parameters()


def sharded_state(model: torch.nn.Module) -> tuple[list[Any], set[str]]:
    """Megatron's own view of a model: sharded tensors, and keys of the objects."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        apply_factories,
    )

    state = model.sharded_state_dict()  # type: ignore[operator]
    apply_factories(state)
    values = list(nested_values(state))
    assert {type(value) for value in values} <= {ShardedTensor, ShardedObject}
    objects = {value.unique_key for value in values if isinstance(value, ShardedObject)}
    return [value for value in values if isinstance(value, ShardedTensor)], objects


def expected_tensors(config: TrinityConfig, dtype: torch.dtype) -> dict[str, Any]:
    entries = [*resolve(config), *resolve_momentum(config)]
    tensors = {
        entry.megatron: (entry.shape, torch.float32 if entry.keep_fp32 else dtype)
        for entry in entries
    }
    assert len(tensors) == len(entries)
    return tensors


@pytest.mark.parametrize("num_dense_layers", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatron_side(
    build: Callable[..., Any], num_dense_layers: int, dtype: torch.dtype
) -> None:
    model = build(
        num_dense_layers=num_dense_layers, params_dtype=dtype, bf16=dtype == torch.bfloat16
    )
    tensors, objects = sharded_state(model)
    found = {shard.key: (tuple(shard.global_shape), shard.dtype) for shard in tensors}
    assert found == expected_tensors(model.config, dtype)
    keys = resolve_extra_state(model.config)
    assert len(set(keys)) == len(keys)
    assert objects == {f"{key}/shard_0_1" for key in keys}


def expert_of(name: str, theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of the hub layout, taken out of the stacked one."""
    if name in theirs:
        return theirs[name]
    place, number, part, _ = name.rsplit(".", 3)
    if part == "down_proj":
        return theirs[f"{place}.down_proj"][int(number)]
    return theirs[f"{place}.gate_up_proj"][int(number)].chunk(2)[part == "up_proj"]


@pytest.mark.parametrize("stacked_experts", [True, False])
def test_names_stand_for_the_same_numbers(build: Callable[..., Any], stacked_experts: bool) -> None:
    model = build()
    with torch.no_grad():  # the gains are alike, and would hide a wrong name
        for parameter in model.parameters():
            parameter.normal_()
    theirs, entries = hf_state_dict(model), resolve(model.config, stacked_experts=stacked_experts)
    by_key = {entry.megatron: entry for entry in entries}
    found = {name: torch.full(shape, torch.nan) for name, shape in named_shapes(entries).items()}
    for shard in sharded_state(model)[0]:
        if shard.key in by_key:
            part = shard.data.detach()[(None,) * shard.prepend_axis_num]
            for block in by_key[shard.key].clip(shard.global_offset, tuple(part.shape)):
                values = block.megatron_view(part, shard.global_offset)
                block.hf_view(found[block.hf_name]).copy_(values)
    assert all(torch.equal(found[name], expert_of(name, theirs)) for name in found)
