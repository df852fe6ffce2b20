"""Rules of a ``TrinityConfig`` beyond its sizes: one function a rule."""

from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import (
    REFUSED_FEATURES,
    REFUSED_LOCAL_FEATURES,
    find_other_architecture,
    flag_of,
)
from trinity_megatron.model.moe.expert_bias import BIAS_RULES

_MEGATRON_STD = 0.02  # its default
_BALANCE_LOSSES = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")


def check_config(config: Any) -> None:
    """Check everything but the sizes (see ``size_rules``).

    Args:
        config: A ``TrinityConfig``.

    Raises:
        UserError: Names the field, its value and the remedy.
    """
    check_balance(config)
    check_fp8_layers(config)
    check_recomputation(config)
    check_architecture(config)
    check_balance_loss(config)
    check_initialization(config)
    refuse_features(config)


def check_balance(config: Any) -> None:
    """Rule, momentum, scale and schedule of the expert bias, and the z-loss."""
    if config.moe_router_bias_update_rule not in BIAS_RULES:
        raise UserError(
            f"moe_router_bias_update_rule={config.moe_router_bias_update_rule!r} is unknown. "
            f"Remedy: --moe-router-bias-update-rule {', '.join(BIAS_RULES)}."
        )
    for name, is_good, wanted in (
        ("moe_router_bias_momentum", 0 <= config.bias_momentum < 1, "at least 0 and below 1"),
        ("moe_router_bias_clamp_scale", config.moe_router_bias_clamp_scale > 0, "positive"),
        ("moe_router_bias_update_rate", config.moe_router_bias_update_rate >= 0, "not negative"),
        (
            "moe_router_bias_warmup_steps",
            config.moe_router_bias_warmup_steps >= 0,
            "not negative",
        ),
        (
            "moe_router_bias_freeze_step",
            (config.moe_router_bias_freeze_step or 0) >= 0,
            "not negative",
        ),
        ("lm_head_z_loss_coeff", config.lm_head_z_loss_coeff >= 0, "not negative"),
    ):
        if not is_good:
            raise UserError(
                f"{name}={getattr(config, name)!r} must be {wanted}. "
                f"Remedy: set {flag_of(name)} so."
            )


def check_fp8_layers(config: Any) -> None:
    """FP8 is Transformer Engine's."""
    if config.fp8 and config.transformer_impl == "local":
        raise UserError(
            f"fp8={config.fp8!r} with transformer_impl='local': the local layers would go on in "
            "bf16 without a word. Remedy: --transformer-impl transformer_engine, or drop "
            "--fp8-format."
        )


def check_recomputation(config: Any) -> None:
    """The local experts recompute as a whole or not at all."""
    if config.transformer_impl == "local" and "moe_act" in (config.recompute_modules or ()):
        raise UserError(
            "recompute_modules has 'moe_act', which the local experts do not look at: no "
            "memory would be saved. Remedy: --recompute-modules moe, or --transformer-impl "
            "transformer_engine."
        )


def check_architecture(config: Any) -> None:
    """What no Trinity model may change."""
    for name, (value, expected) in find_other_architecture(config).items():
        raise UserError(
            f"{name}={value!r} is another architecture. Remedy: {expected!r}, as Trinity has it."
        )


def check_balance_loss(config: Any) -> None:
    """The balance loss is one that the router has, and its coefficient has a loss."""
    kinds = config.moe_router_load_balancing_type
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in _BALANCE_LOSSES:
            raise UserError(
                f"moe_router_load_balancing_type={kinds!r} is not followed by Trinity's "
                f"router. Remedy: one of {', '.join(_BALANCE_LOSSES)}."
            )
    if kinds == "none" and config.moe_aux_loss_coeff:
        raise UserError(
            f"moe_aux_loss_coeff={config.moe_aux_loss_coeff!r} with "
            "moe_router_load_balancing_type='none': there would be no such loss. Remedy: "
            "--moe-router-load-balancing-type seq_aux_loss."
        )


def check_initialization(config: Any) -> None:
    """The standard deviation is that of the report (eq 37-38)."""
    given = {
        "init_method_std": config.init_method_std,
        "embedding_init_method_std": config.embedding_init_method_std,
    }
    for name, value in given.items():
        if value not in (None, _MEGATRON_STD, config.initializer_std):
            raise UserError(
                f"{name}={value} would be overwritten: every matrix is drawn with 0.5/sqrt("
                f"hidden_size) = {config.initializer_std:.6g}. Remedy: drop the flag "
                f"{flag_of(name)}."
            )


def refuse_features(config: Any) -> None:
    """Features that bypass the seams used here, or that the layers would not follow."""
    refused = dict(REFUSED_FEATURES)
    if config.transformer_impl == "local":
        refused.update(REFUSED_LOCAL_FEATURES)
    for name, what in refused.items():
        value = getattr(config, name)
        if value:
            raise UserError(
                f"{name}={value!r}: {what} is not supported by the Trinity layers. "
                f"Remedy: drop the flag {flag_of(name)}."
            )
