"""Checks of arguments that Megatron would make late, with an assertion, or not at all."""

from __future__ import annotations

import argparse

import torch

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host
from trinity_megatron.data.manifest import DataManifest
from trinity_megatron.data.mixture.corpora import MixtureData, MixtureOutline
from trinity_megatron.errors import UserError
from trinity_megatron.model.fp8 import check_fp8, fp8_defaults
from trinity_megatron.optimizer.register import validate_muon_arguments
from trinity_megatron.process.screen import tell_once
from trinity_megatron.training.arguments.chat_checks import check_chat_sources, finish_chat
from trinity_megatron.training.arguments.defaults import has_resiliency_package
from trinity_megatron.training.arguments.evaluation_checks import check_evaluation
from trinity_megatron.training.arguments.fsdp_checks import check_fsdp
from trinity_megatron.training.arguments.layout_checks import check_layout
from trinity_megatron.training.arguments.mixture_checks import check_mixture
from trinity_megatron.training.arguments.schedule import fit_schedule, merge_equal_rates
from trinity_megatron.training.arguments.unsupported import refuse_host
from trinity_megatron.training.arguments.value_ranges import check_keep_last, check_values
from trinity_megatron.training.arguments.vocabulary import check_vocabulary
from trinity_megatron.training.branch import prepare_branch
from trinity_megatron.training.damage import check_on_damage
from trinity_megatron.training.datasets.data_identity import add_text, read_identity
from trinity_megatron.training.resume import check_start, resumed_samples
from trinity_megatron.training.rewind import check_rewind


def check_args(
    args: argparse.Namespace, manifest: DataManifest | None, mixture: MixtureOutline | None
) -> None:
    """Check the arguments of a run, and finish those that follow from others.

    Args:
        args: Of Megatron's parser with ours.
        manifest: Of ``--data``; None without.
        mixture: That ``--data`` names, with its corpora on the first rank; None without.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    check_data_is_named(args)
    refuse_host(args)
    finish_async_save(args)
    check_values(args)
    check_keep_last(args)
    extend_positions(args)
    finish_chat(args, manifest)
    check_layout(args)
    check_on_damage(args)
    check_rewind(args)
    prepare_branch(args)
    merge_equal_rates(args)
    fit_schedule(args, resumed_samples(args))
    if not is_cpu_host():
        finish_fp8(args)
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        args.gradient_accumulation_fusion = False  # on where apex is there; needs Megatron's DDP
    if args.use_megatron_fsdp:
        check_fsdp(args)
    check_spikes(args)
    check_replica_flag(args)
    check_evaluation(args)
    finish_hang_seconds(args)
    finish_nan_check(args)
    if args.optimizer == "muon":
        validate_muon_arguments(args)
    check_mixture(args, mixture)
    if args.rank == 0:  # the others get it with the datasets
        heads = mixture.heads if isinstance(mixture, MixtureData) else {}
        args.data_identity = add_text(read_identity(args, heads), args.text_corpora)
        check_chat_sources(args, heads)
    check_start(args, manifest)
    check_vocabulary(args, manifest)
    # Megatron's own readers of the arguments (FLOPs, memory) want the pattern too.
    args.moe_layer_freq = [int(layer >= args.num_dense_layers) for layer in range(args.num_layers)]


def extend_positions(args: argparse.Namespace) -> None:
    """Let a context extension need ``--seq-length`` alone: no layer has learned positions."""
    if (
        args.seq_length
        and args.max_position_embeddings
        and (args.seq_length > args.max_position_embeddings)
    ):
        tell_once(
            f"> sequences of {args.seq_length} tokens, longer than before: an export says "
            f"max_position_embeddings {args.seq_length} instead of {args.max_position_embeddings}"
        )
        args.max_position_embeddings = args.seq_length


def finish_nan_check(args: argparse.Namespace) -> None:
    """Check the gradient norm of a step, not each loss and bucket, where nothing is run again.

    Megatron's check reads two numbers from the device for each micro-batch and each bucket of
    gradients.  Its re-run engine needs them (``--rerun-mode validate_results``).
    """
    is_ours = args.check_for_nan_in_loss_and_grad and args.rerun_mode == "disabled"
    args.check_gradient_norm = is_ours and args.skip_spikes is None
    if is_ours:
        args.check_for_nan_in_loss_and_grad = False


def check_spikes(args: argparse.Namespace) -> None:
    """Refuse ``--skip-spikes`` with what decides about a step in another way.

    Raises:
        UserError: Names both flags and the remedy.
    """
    if args.skip_spikes is None:
        return
    flag = f"--skip-spikes {args.skip_spikes:g}"
    if args.skip_spikes <= 0 or args.spike_window < 8:
        raise UserError(
            f"{flag} --spike-window {args.spike_window} is out of range. Remedy: a SIGMA above 0 "
            "(6 is usual), and a window of at least 8 steps."
        )
    if args.rerun_mode != "disabled":
        raise UserError(
            f"{flag} with --rerun-mode {args.rerun_mode}: Megatron's engine ends the run where "
            "this one goes on. Remedy: drop one of them."
        )
    if args.fp16:
        raise UserError(
            f"{flag} with --fp16: its loss scaling skips steps by a rule of its own, which none of "
            "the counts would show. Remedy: --bf16, or drop --skip-spikes."
        )
    if args.optimizer_cuda_graph:
        raise UserError(
            f"{flag} with --optimizer-cuda-graph: the captured step cannot be skipped. Remedy: "
            "drop one of them."
        )


def check_replica_flag(args: argparse.Namespace) -> None:
    """Refuse ``--check-replicas`` where ranks hold nothing alike.

    Raises:
        UserError: Names the flag and the remedy.
    """
    if args.check_replicas is None:
        return
    if args.check_replicas < 1:
        raise UserError(
            f"--check-replicas {args.check_replicas} is out of range. Remedy: at least 1 step."
        )
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, name):
            raise UserError(
                f"--check-replicas {args.check_replicas} with --{name.replace('_', '-')}: the "
                "ranks hold parts of the parameters, not the same ones. Remedy: drop one of them."
            )


def finish_hang_seconds(args: argparse.Namespace) -> None:
    """Set the time in which a hang is named; it is shorter than that in which the run ends.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    minutes, seconds = args.distributed_timeout_minutes, args.distributed_timeout_seconds_after_init
    shortest, flag = 60.0 * minutes, f"--distributed-timeout-minutes {minutes}"
    if seconds is not None and seconds < shortest:
        shortest, flag = seconds, f"--distributed-timeout-seconds-after-init {seconds}"
    if args.hang_seconds is None:
        # Source: report section 3.3, an alarm if no step completes within three minutes.
        args.hang_seconds = min(180.0, shortest / 2)
    if not 1 <= args.hang_seconds < shortest:
        raise UserError(
            f"--hang-seconds {args.hang_seconds:g} is out of range: at least 1, and less than the "
            f"{shortest:g} s after which collectives give up ({flag}). Remedy: a smaller one, or a "
            "longer time for them."
        )


def check_data_is_named(args: argparse.Namespace) -> None:
    """There is something to train on."""
    named = (args.data_path, args.train_data_path)
    listed = (args.data_args_path, args.per_split_data_args_path)
    if not any((args.data, args.mock_data, *named, *listed)):
        raise UserError(
            "--data is missing. Remedy: trinity-megatron prepare-data --out DIR, then --data DIR "
            "(or Megatron's own --data-path and --tokenizer-type)."
        )


def finish_async_save(args: argparse.Namespace) -> None:
    """Give ``--async-save`` the worker without which Megatron 0.19 would switch it off.

    Raises:
        UserError: The strategy needs a package that is not installed.
    """
    if not args.async_save:
        return
    if args.async_strategy == "nvrx" and not has_resiliency_package():
        raise UserError(
            "--async-strategy nvrx needs the package nvidia-resiliency-ext, which is not "
            "installed. Remedy: drop the flag, or pip install nvidia-resiliency-ext."
        )
    args.use_persistent_ckpt_worker = True


def finish_fp8(args: argparse.Namespace) -> None:
    """Give FP8 Trinity's defaults on this GPU, and refuse what it cannot run."""
    capability = torch.cuda.get_device_capability()
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    cuda = (int(major), int(minor))
    line = fp8_defaults(args, capability, cuda=cuda)
    check_fp8(args, capability, cuda=cuda)
    if line:
        tell_once(f"> {line}")
