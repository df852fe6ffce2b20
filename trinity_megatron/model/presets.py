"""The released models and the CPU default as presets.

Source of the released numbers: report Table 1 and section 3.4; hub ``config.json`` files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity_megatron.errors import UserError

if TYPE_CHECKING:
    from trinity_megatron.model.config import TrinityConfig


@dataclass(frozen=True)
class Preset:
    """A model with the recipe it was trained with.

    Attributes:
        model: Fields of :class:`TrinityConfig` beyond the shared architecture.
        training: Megatron arguments (by ``dest``) of the recipe; ``lr_wsd_decay_fraction`` is the
            share of the run in which the learning rate decays (phase 3 of the released runs).
        description: One line for ``--help`` and error messages.
    """

    description: str
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


# Balancing of Nano and Mini: the centred sign rule (report eq 19-22).  The rate is not printed;
# Nano's hub json has load_balance_coeff 0.001.
_SIGN_RULE = {"moe_router_bias_update_rule": "sign", "moe_router_bias_update_rate": 1e-3}
# Balancing of Large: SMEBU (report 2.2) and the sequence-wise loss (report section 6, item 4).
_SMEBU = {
    "moe_router_bias_update_rule": "smebu",
    "moe_router_bias_update_rate": 5e-4,
    "moe_router_bias_clamp_scale": 2.0,  # the momentum is the rule's own, 0.5
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-4,
}
_NO_AUX_LOSS = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        description="4 layers, 32 experts top-4, for a laptop",
        model={
            "num_layers": 4,
            "num_dense_layers": 1,
            "hidden_size": 256,
            "ffn_hidden_size": 768,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "kv_channels": 32,
            "num_moe_experts": 32,
            "moe_router_topk": 4,
            "moe_ffn_hidden_size": 64,
            "moe_shared_expert_intermediate_size": 64,
            "moe_router_topk_scaling_factor": 2.0,
            "window_size": (127, 0),
            "vocab_size": 4096,
            "max_position_embeddings": 512,
            **_SMEBU,
            # Large's rates are for batches of 12M tokens; docs/balance_study.md has the search.
            "moe_router_bias_update_rate": 2e-3,
            "moe_aux_loss_coeff": 1e-2,
        },
        training={
            "seq_length": 512,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "train_iters": 400,
            "lr": 1e-2,
            "min_lr": 1e-3,
            "decoupled_lr": 3e-3,
            "decoupled_min_lr": 3e-4,
            "lr_warmup_iters": 20,
            "lr_decay_style": "WSD",
            "lr_wsd_decay_style": "linear",
            "lr_wsd_decay_fraction": 0.4,
        },
    ),
    "nano": Preset(
        description="Trinity Nano, 6.1B parameters, 1.0B active",
        model={
            "num_layers": 56,
            "num_dense_layers": 2,
            "hidden_size": 1024,
            "ffn_hidden_size": 3072,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "kv_channels": 128,
            "num_moe_experts": 128,
            "moe_router_topk": 8,
            "moe_ffn_hidden_size": 256,
            "moe_shared_expert_intermediate_size": 256,
            "moe_router_topk_scaling_factor": 2.826,
            "window_size": (2047, 0),
            "vocab_size": 200192,
            "max_position_embeddings": 131072,
            **_SIGN_RULE,
            **_NO_AUX_LOSS,
        },
        training={
            "seq_length": 4096,
            "global_batch_size": 4096,
            "tensorboard_log_interval": 20,
            "micro_batch_size": 1,
            "lr": 1.0e-3,
            "min_lr": 0.0,
            "decoupled_lr": 3.0e-4,
            "decoupled_min_lr": 0.0,
            "lr_warmup_iters": 2000,
            "lr_decay_style": "WSD",
            "lr_wsd_decay_style": "linear",
            "lr_wsd_decay_fraction": 0.12,
        },
    ),
    "mini": Preset(
        description="Trinity Mini, 26.1B parameters, 3.5B active",
        model={
            "num_layers": 32,
            "num_dense_layers": 2,
            "hidden_size": 2048,
            "ffn_hidden_size": 6144,
            "num_attention_heads": 32,
            "num_query_groups": 4,
            "kv_channels": 128,
            "num_moe_experts": 128,
            "moe_router_topk": 8,
            "moe_ffn_hidden_size": 1024,
            "moe_shared_expert_intermediate_size": 1024,
            "moe_router_topk_scaling_factor": 2.826,
            "window_size": (2047, 0),
            "vocab_size": 200192,
            "max_position_embeddings": 131072,
            **_SIGN_RULE,
            **_NO_AUX_LOSS,
        },
        training={
            "seq_length": 4096,
            "global_batch_size": 4096,
            "tensorboard_log_interval": 20,
            "micro_batch_size": 1,
            "lr": 1.0e-3,
            "min_lr": 0.0,
            "decoupled_lr": 2.0e-4,
            "decoupled_min_lr": 0.0,
            "lr_warmup_iters": 2000,
            "lr_decay_style": "WSD",
            "lr_wsd_decay_style": "linear",
            "lr_wsd_decay_fraction": 0.12,
        },
    ),
    "large": Preset(
        description="Trinity Large, 398.6B parameters, 13.4B active",
        model={
            "num_layers": 60,
            "num_dense_layers": 6,
            "hidden_size": 3072,
            "ffn_hidden_size": 12288,
            "num_attention_heads": 48,
            "num_query_groups": 8,
            "kv_channels": 128,
            "num_moe_experts": 256,
            "moe_router_topk": 4,
            "moe_ffn_hidden_size": 3072,
            "moe_shared_expert_intermediate_size": 3072,
            "moe_router_topk_scaling_factor": 2.448,
            "window_size": (4095, 0),
            "vocab_size": 200192,
            "max_position_embeddings": 524288,
            **_SMEBU,
        },
        training={
            "seq_length": 8192,
            "global_batch_size": 12288,
            "tensorboard_log_interval": 20,
            "micro_batch_size": 1,
            "lr": 8.0e-4,
            "min_lr": 8.0e-5,
            "decoupled_lr": 2.0e-4,
            "decoupled_min_lr": 2.0e-5,
            "lr_warmup_iters": 2000,
            "lr_decay_style": "WSD",
            "lr_wsd_decay_style": "cosine",
            "lr_wsd_decay_fraction": 3 / 17,
        },
    ),
}


# For a checkpoint from elsewhere: a tenth of Mini's peak rates, linearly to zero, as in the context
# extension of Nano and Mini (report 3.5).  The batch is one to begin with on one machine.
_CONTINUED = {
    "seq_length": 4096,
    "global_batch_size": 8,
    "micro_batch_size": 1,
    "lr": 1.0e-4,
    "min_lr": 0.0,
    "decoupled_lr": 2.0e-5,
    "decoupled_min_lr": 0.0,
    "lr_warmup_iters": 100,
    "lr_decay_style": "linear",
}


def get_preset(name: str) -> Preset:
    """Look up a preset, or make one of a checkpoint.

    Args:
        name: A preset, or the folder of a Hugging Face checkpoint or of what ``trinity-megatron
            convert`` made of one: its model, with a tenth of Mini's peak learning rates.

    Raises:
        UserError: No preset has this name (the message lists those there are), or the checkpoint
            is no Trinity model.
    """
    for folder in (Path(name), Path(name, "hf")):
        if name not in PRESETS and (folder / "config.json").is_file():
            return _preset_of_checkpoint(folder)
    if name not in PRESETS:
        known = ", ".join(f"{key} ({preset.description})" for key, preset in PRESETS.items())
        raise UserError(
            f"--preset {name!r} is unknown. Remedy: choose one of {known}, or the folder of a "
            "Hugging Face checkpoint."
        )
    return PRESETS[name]


def _preset_of_checkpoint(folder: Path) -> Preset:
    from trinity_megatron.model.hf_config import model_fields_from_hf, read_hf_config

    model = model_fields_from_hf(read_hf_config(folder))
    balance = _NO_AUX_LOSS if "moe_router_bias_update_rule" in model else _SMEBU
    training = dict(_CONTINUED)
    training["seq_length"] = min(training["seq_length"], model["max_position_embeddings"])
    return Preset(f"the model of {folder}", {**balance, **model}, training)


def trinity_preset(name: str, **overrides: Any) -> TrinityConfig:
    """The configuration of a preset.

    Args:
        name: ``tiny``, ``nano``, ``mini`` or ``large``.
        **overrides: Any field of :class:`TrinityConfig`, e.g. ``num_layers=8``.

    Raises:
        UserError: Unknown preset, or fields that contradict each other.

    Source: report Table 1; ``tiny`` is ours.
    """
    # Here, because it imports Megatron (seconds): the names of the presets come at once.
    from trinity_megatron.model.architecture import TRINITY_ARCHITECTURE
    from trinity_megatron.model.config import TrinityConfig

    return TrinityConfig(**{**TRINITY_ARCHITECTURE, **get_preset(name).model, **overrides})
