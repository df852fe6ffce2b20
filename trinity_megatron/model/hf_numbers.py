"""The numbers in a ``config.json``: anybody may have written them."""

from collections.abc import Mapping
from typing import Any

from trinity_megatron.errors import UserError

_FILE = "config.json"
_SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_dense_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "global_attn_every_n_layers",
    "max_position_embeddings",
    "sliding_window",
}
_FRACTIONS = {"rms_norm_eps", "route_scale", "load_balance_coeff"}
_MAY_BE_ZERO = {"num_dense_layers", "num_shared_experts"}
_MAX_NUMBER = 2**31 - 1
_MAX_PARTS = 2**20
MAX_THETA = 1e30  # in fp32


def check_numbers(fields: Mapping[str, Any]) -> None:
    """Refuse sizes that are no numbers, or so large that a list of the layers fills the memory.

    Args:
        fields: Of the file; null, and fields that are no sizes, are passed over.

    Raises:
        UserError: Names the field and its value.
    """
    for name, value in fields.items():
        if name == "mup_enabled" and not isinstance(value, bool | None):
            raise UserError(f"{_FILE}: {name}={value!r:.40} is not true or false.")
        if value is None or name not in _SIZES | _FRACTIONS:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        least = 0 if name in _MAY_BE_ZERO else 1e-30
        if not (is_number and least <= value <= _MAX_NUMBER):
            raise UserError(
                f"{_FILE}: {name}={value!r:.40} is not a positive number up to {_MAX_NUMBER}."
            )
        if not isinstance(value, int) and name in _SIZES:
            raise UserError(f"{_FILE}: {name}={value!r} is not a whole number.")
    layers, experts = (fields.get(name) or 0 for name in ("num_hidden_layers", "num_experts"))
    if max(layers, layers * experts) > _MAX_PARTS:
        raise UserError(
            f"{_FILE}: num_hidden_layers={layers} and num_experts={experts} are a model of "
            f"more than {_MAX_PARTS} experts. Remedy: use the file of the checkpoint as it was "
            "released."
        )
