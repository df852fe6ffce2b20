"""Megatron's flags that a Trinity run would not follow: refused at the start, never ignored."""

from __future__ import annotations

import argparse

from megatron.training.utils import print_rank_0

from trinity_megatron.config import flag_of
from trinity_megatron.host import is_cpu_host

# Argument -> why its flag is not followed, and a remedy.
_MASKING = "--dataloader-inter-document-masking (positions need no reset: RoPE is relative)"
_DROP = "drop the flag"
_NOT_BY_THIS_SCRIPT = "belongs to Megatron's pretrain_gpt.py and is not known here"
_NOT_WITH_A_CONFIG = "is not looked at where the model is built from a configuration"
_NOT_FOLLOWED = {
    "freeze_all_layers": (
        f"{_NOT_WITH_A_CONFIG}: everything would be trained",
        "--skip-train evaluates without training",
    ),
    "create_all_gather_group": (_NOT_WITH_A_CONFIG, _DROP),
    "rampup_batch_size": (
        "is ignored by Megatron 0.19",
        "--step-batch-size-schedule '0:N TOKENS:M'",
    ),
    "full_validation": (
        "is not supported: Megatron 0.19 fails with it and one validation set",
        "--eval-iters N reads N global batches of one set, or of a blend of several",
    ),
    "multiple_validation_sets": (
        "is not supported: Megatron 0.19 fails with it unless --full-validation is given, and the "
        "end of a Trinity run reports one set",
        "--eval-iters N reads N global batches of one set, or of a blend of several",
    ),
    "reset_attention_mask": ("needs a mask that is never built", _MASKING),
    "reset_position_ids": ("has no effect on RoPE", _MASKING),
    "use_checkpoint_args": ("is not looked at", "--preset DIR takes the model of a checkpoint"),
    "use_mp_args_from_checkpoint_args": ("is not looked at", "give the parallel sizes again"),
    "init_method_xavier_uniform": ("has no effect: initialization is Trinity's own", _DROP),
    "check_for_spiky_loss": ("is checked by pretrain_gpt.py only", _DROP),
    "sft": (_NOT_BY_THIS_SCRIPT, _DROP),
    "fim_data": (_NOT_BY_THIS_SCRIPT, _DROP),
    "logits_load_dir": (_NOT_BY_THIS_SCRIPT, _DROP),
    "per_dataset_sequences_path": (_NOT_BY_THIS_SCRIPT, _DROP),
    "inprocess_restart": (_NOT_BY_THIS_SCRIPT, _DROP),
    "log_straggler": (_NOT_BY_THIS_SCRIPT, _DROP),
}
_NOT_FOLLOWED_BY_MUON = {
    "dump_param_to_param_group_map": ("is not written by Muon", "optimizer/param_groups.py has it"),
}
_NOT_FOLLOWED_BY_LOCAL_LAYERS = {
    "flash_attention_version": ("chooses among Transformer Engine's kernels", _DROP),
    "save_tokens_per_expert_interval": (
        "reads Transformer Engine's experts",
        "the run's TensorBoard folder has the tokens of every expert",
    ),
    "te_precision_config_file": ("is for Transformer Engine's layers", _DROP),
    "tp_comm_overlap": ("is done by Transformer Engine's layers", _DROP),
}
# Only faster elsewhere: the run is the same without.
_WITHOUT_EFFECT = ("cross_entropy_loss_fusion", "moe_router_fusion")

# Argument -> flag to name in the error, for requests that only a GPU can meet.
_CUDA_ONLY = {
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "tp_comm_overlap": "--tp-comm-overlap",
    "moe_permute_fusion": "--moe-permute-fusion",
    "moe_enable_deepep": "--moe-enable-deepep",
    "nccl_ub": "--use-nccl-ub",
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "use_torch_fsdp2": "--use-torch-fsdp2",
    "optimizer_cpu_offload": "--optimizer-cpu-offload",
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
    "use_persistent_ckpt_worker": "--use-persistent-ckpt-worker",
}


def refuse_flags(args: argparse.Namespace) -> None:
    """Refuse what the run would not follow; say what has no effect on it.

    Raises:
        ValueError: Names the flag, its value and the remedy.
    """
    if is_cpu_host():
        _refuse_cuda_only(args)
    tables = [_NOT_FOLLOWED]
    if args.optimizer == "muon":
        tables.append(_NOT_FOLLOWED_BY_MUON)
    if args.transformer_impl == "local":
        tables.append(_NOT_FOLLOWED_BY_LOCAL_LAYERS)
        backend = args.attention_backend.name
        if backend not in ("auto", "local"):
            raise ValueError(
                f"--attention-backend {backend} chooses among Transformer Engine's, and "
                "--transformer-impl is local. Remedy: drop the flag, or --transformer-impl "
                "transformer_engine."
            )
    for table in tables:
        for name, (why, remedy) in table.items():
            if getattr(args, name):
                raise ValueError(f"{flag_of(name)} {why}. Remedy: {remedy}.")
    _refuse_patterns(args)
    if args.non_persistent_ckpt_type == "local":
        raise ValueError(
            "--non-persistent-ckpt-type local stores pickles, which run whatever they name when "
            "they are loaded. Remedy: --non-persistent-ckpt-type global."
        )
    for name in _WITHOUT_EFFECT:
        if getattr(args, name):
            print_rank_0(f"> {flag_of(name)} has no effect on Trinity's layers")


def _refuse_patterns(args: argparse.Namespace) -> None:
    """Megatron's lists of layers follow from two flags of ours."""
    for name, default, ours in (
        ("moe_layer_freq", 1, "--num-dense-layers"),
        ("window_attn_skip_freq", None, "--global-attn-every-n-layers"),
        ("no_rope_freq", None, "--global-attn-every-n-layers"),
    ):
        value = getattr(args, name)
        if value != default:
            raise ValueError(
                f"{flag_of(name)} {value} would be overwritten: it follows from {ours}. Remedy: "
                f"{ours}."
            )


def _refuse_cuda_only(args: argparse.Namespace) -> None:
    for name, flag in _CUDA_ONLY.items():
        if getattr(args, name):
            raise ValueError(
                f"{flag}={getattr(args, name)!r} needs a CUDA device, and torch finds none on this "
                f"machine. Remedy: drop {flag}, or run on a machine with a GPU."
            )
    if args.transformer_impl == "transformer_engine":
        raise ValueError(
            "--transformer-impl transformer_engine needs a CUDA device, and torch finds none on "
            "this machine. Remedy: --transformer-impl local (the default here)."
        )
    if args.distributed_backend == "nccl":
        raise ValueError(
            "--distributed-backend nccl needs a CUDA device, and torch finds none on this machine. "
            "Remedy: --distributed-backend gloo (the default here)."
        )
    if args.cuda_graph_impl != "none":
        raise ValueError(
            f"--cuda-graph-impl {args.cuda_graph_impl} needs a CUDA device, and torch finds none "
            "on this machine. Remedy: drop --cuda-graph-impl."
        )
