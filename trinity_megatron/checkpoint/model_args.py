"""The model configuration in the arguments of a checkpoint."""

import argparse
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import (
    ARGUMENT_DEST,
    MODEL_FIELDS,
    TRINITY_ARCHITECTURE,
    count_dense_layers,
)
from trinity_megatron.model.config import TrinityConfig

# Fields of TrinityConfig that are stored in the arguments of a checkpoint.
_SAVED_FIELDS = (
    *MODEL_FIELDS,
    "max_position_embeddings",
    "moe_router_bias_update_rule",
    "moe_router_bias_update_rate",
    "tokenizer_vocab_size",
)


def config_from_args(args: argparse.Namespace, **overrides: Any) -> TrinityConfig:
    """Build the model config from the arguments of a run.

    Args:
        args: Arguments stored in a checkpoint.
        **overrides: Values for fields of :class:`TrinityConfig`.

    Raises:
        UserError: The arguments describe another architecture.
    """
    values = dict(TRINITY_ARCHITECTURE)
    for name in _SAVED_FIELDS:
        value = getattr(args, ARGUMENT_DEST.get(name, name), None)
        if value is not None:
            values[name] = value
    score, experts = (getattr(args, n, None) for n in ("moe_router_score_function", "num_experts"))
    if score != "sigmoid" or not experts:
        raise UserError(
            f"The checkpoint was saved with num_experts={experts!r} and moe_router_score_function="
            f"{score!r}: it is no Trinity model."
        )
    if "num_dense_layers" not in values:  # saved by another training script
        values["num_dense_layers"] = count_dense_layers(
            args.moe_layer_freq, num_layers=args.num_layers
        )
    return TrinityConfig(**{**values, **overrides})


def common_state(config: TrinityConfig) -> dict[str, Any]:
    """The common state of a converted checkpoint: what Megatron reads besides the tensors.

    Args:
        config: Config of the model.
    """
    args = {ARGUMENT_DEST.get(name, name): getattr(config, name) for name in _SAVED_FIELDS}
    args.update(
        padded_vocab_size=config.vocab_size,
        moe_layer_freq=config.moe_layer_freq,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        add_position_embedding=True,
        position_embedding_type="rope",
        group_query_attention=True,
        swiglu=True,
        normalization="RMSNorm",
        untie_embeddings_and_output_weights=True,
        add_bias_linear=False,
        spec=["trinity_megatron.layer_specs", "get_trinity_layer_spec"],
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
    return {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        },
    }
