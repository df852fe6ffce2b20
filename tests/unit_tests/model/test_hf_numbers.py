"""A ``config.json`` of any numbers is a model of our sizes, or one error that names the field."""

from typing import Any

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.model.hf_config import trinity_config_from_hf

WHOLE = {
    "model_type": "afmoe",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 16,
}
HOSTILE: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 3.5),
    ("num_hidden_layers", "4"),
    ("num_hidden_layers", [4]),
    ("num_hidden_layers", True),
    ("num_hidden_layers", float("nan")),
    ("num_experts", 2**30),
    ("vocab_size", 10**18),
    ("vocab_size", -1),
    ("sliding_window", 1e300),
    ("global_attn_every_n_layers", "x"),
    ("num_dense_layers", 10**12),
    ("rms_norm_eps", float("inf")),
    ("rope_theta", float("inf")),
    ("rope_theta", 10**400),
    ("load_balance_coeff", "x"),
    ("mup_enabled", "yes"),
]


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_hostile_number(name: str, value: Any) -> None:
    assert trinity_config_from_hf(WHOLE).num_layers == 4
    with pytest.raises(UserError, match=name) as error:
        trinity_config_from_hf({**WHOLE, name: value})
    assert len(str(error.value)) < 300
