"""Ranges of the numbers that a run is given: what is outside would fail late, or train nonsense."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

from trinity_megatron.data.mixture.quantities import parse_tokens
from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import flag_of

# What Megatron's generators, numpy's and those of the initialization all take.
_LARGEST_SEED = 2**31 - 1


def check_values(args: argparse.Namespace) -> None:
    """Refuse numbers outside their range, NaN and infinity, and pairs in the wrong order.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    for wanted, is_good, names in _RANGES:
        for name in names:
            for value in _numbers(getattr(args, name, None)):
                if not is_good(value):
                    raise UserError(
                        f"{flag_of(_FLAG_NAMES.get(name, name))} {value} is out of range. Remedy: "
                        f"give {wanted}."
                    )
    check_window(getattr(args, "window_size", None))
    if hasattr(args, "weight_decay_incr_style"):
        _check_weight_decay(args)
    if (getattr(args, "kv_channels", None) or 0) % 2:
        raise UserError(
            f"--kv-channels {args.kv_channels} is odd: RoPE turns pairs. Remedy: an even number."
        )
    ordered = [*_ORDERED]
    if getattr(args, "decoupled_min_lr", None) is None:  # then it is --min-lr
        ordered.append(("min_lr", "decoupled_lr"))
    for low, high in ordered:
        smaller, larger = getattr(args, low, None), getattr(args, high, None)
        if smaller is not None and larger is not None and smaller > larger:
            raise UserError(
                f"{flag_of(low)} {smaller:g} is above {flag_of(high)} {larger:g}. Remedy: "
                f"{flag_of(low)} at most {larger:g}."
            )


def check_window(size: tuple[int, ...] | None) -> None:
    """Refuse a window that is not causal.

    Args:
        size: Of ``--window-size``: tokens before and after; None or -1 before: no limit.

    Raises:
        UserError: Names the value and the remedy.
    """
    if size is not None and (len(size) != 2 or size[0] < -1 or size[1] != 0):
        raise UserError(
            f"--window-size {','.join(map(str, size))} is not a causal window. Remedy: "
            "--window-size N,0 lets a token see itself and the N before it (-1,0: all)."
        )


def _check_weight_decay(args: argparse.Namespace) -> None:
    """Megatron wants both ends of a weight decay that changes, and none of one that does not."""
    style, ends = args.weight_decay_incr_style, (args.start_weight_decay, args.end_weight_decay)
    if style == "constant" and ends != (None, None):
        raise UserError(
            "--start-weight-decay and --end-weight-decay are for a weight decay that changes. "
            "Remedy: --weight-decay-incr-style linear or cosine, or --weight-decay alone."
        )
    if style != "constant" and None in ends:
        raise UserError(
            f"--weight-decay-incr-style {style} needs both ends. Remedy: --start-weight-decay A "
            "--end-weight-decay B."
        )


def _numbers(value: Any) -> Iterator[float]:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)):
            yield number


_FLAG_NAMES = {"layernorm_epsilon": "norm_epsilon"}

# What is left out is None and is not looked at.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "micro_batch_size",
            "global_batch_size",
            "seq_length",
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "ffn_hidden_size",
            "moe_ffn_hidden_size",
            "train_iters",
            "train_samples",
            "log_interval",
            "eval_interval",
            "save_interval",
            "tensorboard_log_interval",
            "tensorboard_queue_size",
            "log_memory_interval",
            "exit_interval",
            "exit_duration_in_mins",
            "eval_global_batch_size",
            "eval_micro_batch_size",
            "train_sync_interval",
            "check_weight_hash_across_dp_replicas_interval",
            "save_params_interval",
            "save_activations_interval",
            "save_wgrads_interval",
            "save_dgrads_interval",
            "save_retain_interval",
            "non_persistent_save_interval",
            "lr_decay_iters",
            "lr_decay_samples",
            "lr_wsd_decay_iters",
            "lr_wsd_decay_samples",
            "max_position_embeddings",
            "make_vocab_size_divisible_by",
            "vocab_size",
            "padded_vocab_size",
            "num_dataset_builder_threads",
            "distributed_timeout_minutes",
            "distributed_timeout_seconds_after_init",
            "num_distributed_optimizer_instances",
            "recompute_num_layers",
            "mlp_chunks_for_training",
            "ddp_num_buckets",
            "ddp_bucket_size",
            "muon_num_ns_steps",
            "hysteresis",
            "dist_ckpt_workers",
            "iterations_to_skip",
            "moe_routing_trace_max_training_iters",
        ),
    ),
    (
        "at least 0",
        lambda value: 0 <= value < math.inf,
        (
            "lr",
            "decoupled_lr",
            "min_lr",
            "decoupled_min_lr",
            "lr_warmup_init",
            "lr_warmup_iters",
            "lr_warmup_samples",
            "weight_decay",
            "start_weight_decay",
            "end_weight_decay",
            "eval_iters",
            "start_eval_at_iter",
            "num_experts",
            "num_workers",
            "manual_gc_interval",
            "moe_aux_loss_coeff",
            "moe_z_loss_coeff",
            "error_injection_rate",
            "mid_level_dataset_surplus",
            "profile_step_start",
            "profile_step_end",
            "profile_ranks",
        ),
    ),
    ("at least 0 (0: no clipping)", lambda value: 0 <= value < math.inf, ("clip_grad",)),
    (
        "more than 0",
        lambda value: 0 < value < math.inf,
        (
            "adam_eps",
            "layernorm_epsilon",
            "rotary_base",
            "rotary_seq_len_interpolation_factor",
            "rope_scaling_factor",
            "moe_router_topk_scaling_factor",
            "muon_extra_scale_factor",
            "loss_scale",
            "initial_loss_scale",
            "min_loss_scale",
            "loss_scale_window",
        ),
    ),
    (
        "at least 0 and less than 1",
        lambda value: 0 <= value < 1,
        (
            "adam_beta1",
            "adam_beta2",
            "sgd_momentum",
            "muon_momentum",
            "lion_beta1",
            "lion_beta2",
            "hidden_dropout",
            "attention_dropout",
            "lr_warmup_fraction",
            "moe_input_jitter_eps",
        ),
    ),
    ("more than 0 and at most 1", lambda value: 0 < value <= 1, ("rotary_percent",)),
    (
        f"1 to {_LARGEST_SEED}",
        lambda value: 1 <= value <= _LARGEST_SEED,
        ("seed",),
    ),
)

# The first is not above the second.
_ORDERED = (
    ("min_lr", "lr"),
    ("decoupled_min_lr", "decoupled_lr"),
    ("lr_warmup_init", "lr"),
)


def _check_keep_every(args: argparse.Namespace) -> None:
    flag = f"--keep-every {args.keep_every}"
    try:
        parse_tokens(args.keep_every)
    except ValueError as error:
        raise UserError(f"{flag}: {error}. Remedy: e.g. 100B or 2.5M.") from error
    if args.keep_last is None:
        raise UserError(
            f"{flag} without --keep-last: nothing is deleted. Remedy: --keep-last N, or drop the "
            "flag."
        )


def check_keep_last(args: argparse.Namespace) -> None:
    """Refuse a retention that cannot be done.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    if args.keep_every is not None:
        _check_keep_every(args)
    if args.keep_last is None:
        return
    flag = f"--keep-last {args.keep_last}"
    if args.keep_last < 1:
        raise UserError(f"{flag} would keep no checkpoint. Remedy: give at least 1.")
    if not args.save or "://" in args.save:
        raise UserError(
            f"{flag} deletes in a folder of this machine, and --save is {args.save}. Remedy: --out "
            "DIR (or --save DIR), or drop the flag."
        )
    if args.ckpt_format != "torch_dist":
        raise UserError(
            f"{flag} cannot tell whether a checkpoint of --ckpt-format {args.ckpt_format} is "
            "complete. Remedy: --ckpt-format torch_dist, or drop the flag."
        )
