"""Defaults of a run: of its preset, its folders and its host."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host
from trinity_megatron.data.mixture.corpora import MixtureOutline
from trinity_megatron.model.architecture import ARGUMENT_DEST, TRINITY_ARCHITECTURE
from trinity_megatron.model.presets import Preset
from trinity_megatron.optimizer.register import MUON_ARGUMENT_DEFAULTS


def default_arguments(
    preset: Preset, data: str | None, mixture: MixtureOutline | None, out: str | None
) -> dict[str, Any]:
    """Defaults (by ``dest``) of a run; every one can be overridden by its Megatron flag.

    Args:
        preset: Of ``--preset``.
        data: Folder or file of ``--data``; None without.
        mixture: That ``data`` names; None for a prepared folder and without.
        out: Folder of ``--out``; None without.
    """
    values = {**_model_arguments(preset), **_TRAINING, **_checkpoint_arguments()}
    values.update(preset.training)
    values.update(_host_arguments())
    if mixture is not None:
        values.update(_mixture_arguments(mixture))
    elif data:
        values.update(_folder_arguments(data))
    if out:
        values.update(_run_folder_arguments(out))
        values.setdefault("tensorboard_log_interval", 1)
    return values


def _model_arguments(preset: Preset) -> dict[str, Any]:
    """The preset's model and what every Trinity model shares."""
    values = {ARGUMENT_DEST.get(name, name): value for name, value in preset.model.items()}
    values.pop("vocab_size", None)  # the tokenizer has it
    for name, value in TRINITY_ARCHITECTURE.items():
        if name not in ("gated_linear_unit", "activation_func"):  # --swiglu sets both
            values[ARGUMENT_DEST.get(name, name)] = value
    values.update(
        swiglu=True,
        group_query_attention=True,
        position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
        spec=["trinity_megatron.layer_specs", "get_trinity_layer_spec"],
    )
    return values


_TRAINING: dict[str, Any] = {
    "optimizer": "muon",
    "lr_warmup_init": 0.0,
    "lr_wsd_decay_fraction": 0.1,
    "eval_interval": 100,
    "eval_iters": 8,
    "log_interval": 10,
    "logging_level": logging.WARNING,  # progress is printed; INFO lists every parameter
    # Mean over the tokens of the global batch, however they lie on ranks and micro-batches.
    "calculate_per_token_loss": True,
    # A resume with another --train-iters takes the schedule of the command line.
    "override_opt_param_scheduler": True,
    "create_attention_mask_in_dataloader": False,
    # Not published for any of the models: common values stand in.
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "clip_grad": 1.0,
    **MUON_ARGUMENT_DEFAULTS,
}


def _checkpoint_arguments() -> dict[str, Any]:
    """Format of the checkpoints."""
    return {
        "ckpt_format": "torch_dist",
        # Megatron's own needs no further package.
        "async_strategy": "nvrx" if has_resiliency_package() else "mcore",
        # The state of a distributed optimizer loads under every layout.
        "dist_ckpt_optim_fully_reshardable": True,
    }


def _mixture_arguments(mixture: MixtureOutline) -> dict[str, Any]:
    """What the file of a mixture names; its corpora are looked at later."""
    values: dict[str, Any] = {"tokenizer_type": "HuggingFaceTokenizer"}
    if mixture.tokenizer is not None:
        values["tokenizer_model"] = str(mixture.tokenizer)
    return values


def _folder_arguments(data: str) -> dict[str, Any]:
    """What ``prepare-data`` wrote to the folder."""
    return {
        "train_data_path": [os.path.join(data, "train")],
        "valid_data_path": [os.path.join(data, "validation")],
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": os.path.join(data, "tokenizer"),
    }


def _run_folder_arguments(out: str) -> dict[str, Any]:
    """Checkpoints, caches and logs below the folder of the run."""
    return {
        "save": os.path.join(out, "checkpoints"),
        "load": os.path.join(out, "checkpoints"),
        "save_interval": 200,
        # SIGTERM saves.  The ranks agree on it in every step, which would make a GPU wait.
        "exit_signal_handler": is_cpu_host(),
        "data_cache_path": os.path.join(out, "data_cache"),
        "tensorboard_dir": os.path.join(out, "tensorboard"),
        "log_timers_to_tensorboard": True,
        "wandb_project": os.environ.get("WANDB_PROJECT", "trinity-megatron"),
        "wandb_exp_name": os.environ.get("WANDB_NAME", os.path.basename(os.path.normpath(out))),
        "wandb_save_dir": os.environ.get("WANDB_DIR", out),
    }


def _host_arguments() -> dict[str, Any]:
    """What a host without a GPU (or without NVIDIA's extensions) has to do without."""
    values: dict[str, Any] = {
        "transformer_impl": "local",
        # By apex or by torch, see model/weight_gradients.py.
        "gradient_accumulation_fusion": not is_cpu_host(),
        "no_persist_layer_norm": True,  # an extension of apex, which is optional
        "apply_rope_fusion": _has_fused_rope(),
        "moe_permute_fusion": _has_fused_permutation(),
        # Megatron's engine wants another GPU for its second opinion, ends with a code and no word,
        # and waits for the device several times a micro-batch; see GradientCheck.
        "rerun_mode": "disabled",
    }
    if is_cpu_host():
        values.update(
            distributed_backend="gloo",
            masked_softmax_fusion=False,
            # Worker processes would take the two cores from the training.
            num_workers=0,
        )
    else:
        # No recipe asked for: the best that this GPU runs (Megatron's own default is "delayed").
        values.update(bf16=True, moe_grouped_gemm=True, fp8_recipe=None)
    return values


def _has_fused_rope() -> bool:
    """Whether Megatron has a kernel for RoPE: Transformer Engine's, which is optional."""
    kernels = (rope_utils.fused_apply_rotary_pos_emb, rope_utils.fused_apply_rotary_pos_emb_thd)
    return not is_cpu_host() and None not in kernels


def _has_fused_permutation() -> bool:
    """Whether Megatron's dispatcher has kernels that sort tokens: Transformer Engine's."""
    kernels = (moe_utils.fused_permute_with_probs, moe_utils.fused_unpermute)
    return not is_cpu_host() and None not in kernels


def has_resiliency_package() -> bool:
    """Whether nvidia-resiliency-ext, which saves asynchronously, is installed."""
    return importlib.util.find_spec("nvidia_resiliency_ext") is not None
