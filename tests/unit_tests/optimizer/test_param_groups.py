"""Every parameter of the model has one owner, and fused rows go to the right matrix."""

from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trinity_megatron.optimizer.param_groups import (
    PARAM_TABLE,
    attach_muon_splits,
    find_row,
    is_adam_parameter,
)

ADAM, MUON, QKV, GATE_UP = (
    ("adam", None),
    ("muon", None),
    ("muon", "query_groups"),
    ("muon", "gate_up"),
)

# As named_parameters() has them: local, stacked and Transformer Engine layouts.
NAMES = {
    "embedding.word_embeddings.weight": ADAM,
    "output_layer.weight": ADAM,
    "decoder.final_layernorm.weight": ADAM,
    "decoder.layers.3.input_layernorm.weight": ADAM,
    "decoder.layers.3.pre_mlp_layernorm.weight": ADAM,
    "decoder.layers.3.post_attention_layernorm.weight": ADAM,
    "decoder.layers.3.post_mlp_layernorm.weight": ADAM,
    "decoder.layers.3.self_attention.q_layernorm.weight": ADAM,
    "decoder.layers.3.self_attention.k_layernorm.weight": ADAM,
    "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": ADAM,
    "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": ADAM,
    "decoder.layers.3.self_attention.linear_qkv.weight": QKV,
    "decoder.layers.3.self_attention.linear_proj.weight": MUON,
    "decoder.layers.0.mlp.linear_fc1.weight": GATE_UP,
    "decoder.layers.0.mlp.linear_fc2.weight": MUON,
    "decoder.layers.3.mlp.shared_experts.linear_fc1.weight": GATE_UP,
    "decoder.layers.3.mlp.shared_experts.linear_fc2.weight": MUON,
    "decoder.layers.3.mlp.experts.linear_fc1.weight": GATE_UP,
    "decoder.layers.3.mlp.experts.linear_fc2.weight": MUON,
    "decoder.layers.3.mlp.experts.linear_fc1.weight0": GATE_UP,
    "decoder.layers.3.mlp.experts.linear_fc2.weight127": MUON,
    "decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight": GATE_UP,
    "decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.weight": MUON,
    "decoder.layers.3.mlp.router.weight": MUON,
}


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_exactly_one_row(name: str, prefix: str) -> None:
    rows = [row for row in PARAM_TABLE if fnmatchcase(f".{prefix}{name}", f"*.{row.name}")]
    assert len(rows) == 1
    row = find_row(prefix + name)
    assert (row.optimizer, row.split) == NAMES[name]


def test_every_row_is_used() -> None:
    assert {find_row(name) for name in NAMES} == set(PARAM_TABLE)


def test_stacked_experts_are_muons() -> None:
    """Megatron's own rule sends everything that is not 2-D to Adam."""
    name = "module.module.decoder.layers.3.mlp.experts.linear_fc1.weight"
    assert not is_adam_parameter(torch.empty(4, 8, 6), name)
    assert is_adam_parameter(torch.empty(8), "decoder.final_layernorm.weight")


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.3.mlp.shared_experts.gate_weight",
        "decoder.layers.3.self_attention.linear_qkv.bias",
        "decoder.layers.3.mlp.my_linear_fc1.weight",
        "weight",
    ],
)
def test_an_unknown_parameter_is_named_with_the_file_to_extend(name: str) -> None:
    with pytest.raises(ValueError, match="param_groups.py") as error:
        is_adam_parameter(torch.empty(4, 4), name)
    assert name in str(error.value)


def test_muon_refuses_a_row_that_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="router.*matrices"):
        is_adam_parameter(torch.empty(4), "decoder.layers.3.mlp.router.weight")


def config(**changes: Any) -> SimpleNamespace:
    values = {
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 4,
        "attention_output_gate": True,
        "gated_linear_unit": True,
    }
    return SimpleNamespace(**{**values, **changes})


def split_labels(name: str, labels: list[str], columns: int = 2, **changes: Any) -> list[list[str]]:
    """Rows of a parameter, numbered; the labels of the rows of each matrix it is split into."""
    param = torch.arange(len(labels)).float().unsqueeze(1).repeat(1, columns)
    param = param.expand(3, -1, -1) if "mlp.experts.linear" in name else param
    attach_muon_splits([(name, param)], config(**changes))
    sizes = param.muon_split.sizes  # type: ignore[attr-defined]
    stack = param if param.dim() == 3 else param[None]
    blocks = stack.unflatten(1, (-1, sum(sizes))).split(sizes, dim=2)
    return [[labels[int(row)] for row in block[0].flatten(0, 1)[:, 0]] for block in blocks]


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("local_groups", [(0, 1), (1,)])  # serial; the second of two TP ranks
def test_query_groups_are_gathered_per_projection(
    gate: bool, local_groups: tuple[int, ...]
) -> None:
    kinds = {"q": 3, "g": 3, "k": 1, "v": 1} if gate else {"q": 3, "k": 1, "v": 1}
    labels = [
        f"{kind}{group}.{head}.{channel}"
        for group in local_groups
        for kind, heads in kinds.items()
        for head in range(heads)
        for channel in range(4)
    ]
    parts = split_labels("self_attention.linear_qkv.weight", labels, attention_output_gate=gate)
    assert parts == [[label for label in labels if label[0] == kind] for kind in kinds]


@pytest.mark.parametrize(
    "name",
    ["mlp.linear_fc1.weight", "mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc1.weight5"],
)
def test_gate_and_up_are_halves(name: str) -> None:
    assert split_labels(name, ["g0", "g1", "u0", "u1"]) == [["g0", "g1"], ["u0", "u1"]]


def test_what_is_not_fused_is_not_split() -> None:
    params = {
        "self_attention.linear_proj.weight": torch.empty(24, 24),
        "mlp.linear_fc1.weight": torch.empty(8, 24),
        "self_attention.linear_qkv.weight": torch.empty(64, 24),
    }
    attach_muon_splits(params.items(), config(gated_linear_unit=False), split_qkv=False)
    assert not any(hasattr(param, "muon_split") for param in params.values())


def test_split_refusals_name_the_remedy() -> None:
    half_a_group = ("self_attention.linear_qkv.weight", torch.empty(16, 24))
    with pytest.raises(ValueError, match="num_query_groups=2 .*--tensor-model-parallel-size"):
        attach_muon_splits([half_a_group], config())
    with pytest.raises(ValueError, match="moe_mlp_glu_interleave_size=32.*leave it unset"):
        attach_muon_splits([], config(moe_mlp_glu_interleave_size=32))
    sharded = torch.empty(24, 24)
    sharded.is_gtp_weight_remat = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="drop --tensor-parallel-num-weight-shards"):
        attach_muon_splits([("self_attention.linear_proj.weight", sharded)], config())
